"""Runs a written model in ONNX Runtime and compares it with the captured graph, which torch evaluates.

The captured graph is the one before any pass, so passes, translation and ONNX Runtime are checked together. A language
model gets three sequences at once there; in ONNX Runtime two of them are rows of a batch, one padded, whose last tokens
come in a second call behind the first one's present, and the third is a single token alone. A plain module is called at
two sizes of its symbolic dimensions, one of them 1.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from moec.compiler.capture.captured import Captured
from moec.compiler.capture.onnx.examples import number as size_of
from moec.compiler.capture.onnx.examples import terms
from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.onnx.interface import MASK, TOKENS, Interface, Port
from moec.compiler.export.onnx.session import open_session
from moec.passes.ir.evaluate import evaluate

TOLERANCE = 1e-4
"""Of the largest output: float32 sums in another order, through all layers."""
TOLERANCE_F16 = 2e-2
"""Where the graph itself computes in float16: ONNX Runtime computes parts of it in float32, and rounds elsewhere."""
SEED = 20
FIRST, SECOND, PADDED = 5, 2, 2
"""Tokens of the first call, of the second, and how many of the first are padding in the second row."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One call: inputs by name (those of caches absent: they follow from the call before, or are empty).

    expected: the outputs, in order; of a language model the logits only.  rows: a mask of what counts in the first.
    continues: the past is the present of the call before.
    """

    inputs: dict[str, Tensor]
    expected: tuple[Tensor, ...]
    counts: Tensor | None = None
    continues: bool = False


@torch.no_grad()
def reference(captured: Captured, interface: Interface, examples: tuple[Any, ...] | None = None) -> list[Step]:
    """What the captured graph answers; read before passes change it. Cost: every weight is read once or twice."""
    if interface.caches:
        return _language_model(captured)
    return [_module(captured, interface, examples, n) for n in (1, 0)]


def _language_model(captured: Captured) -> list[Step]:
    generator = torch.Generator().manual_seed(SEED)
    lengths = (FIRST + SECOND, FIRST + SECOND - PADDED, 1)
    vocabulary = max(2, captured.info.vocab_size)
    tokens = [torch.randint(0, vocabulary, (n,), generator=generator) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])
    slots = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    caches = [torch.zeros(c.input_shape(len(lengths), max(lengths)), dtype=c.dtype) for c in captured.info.caches]
    logits = evaluate(captured.graph_module, [torch.cat(tokens), positions, slots, *caches], captured.read)
    a, b, c = logits.split(list(lengths))
    cut = FIRST - PADDED
    padding = torch.zeros(PADDED, dtype=torch.long)
    ids = torch.stack([tokens[0][:FIRST], torch.cat([padding, tokens[1][:cut]])])
    mask = torch.ones(2, FIRST + SECOND, dtype=torch.long)
    mask[1, :PADDED] = 0
    blank = a.new_zeros(PADDED, a.shape[1])
    first = torch.stack([a[:FIRST], torch.cat([blank, b[:cut]])])
    later = torch.stack([tokens[0][FIRST:], tokens[1][cut:]])
    return [
        Step({TOKENS: ids, MASK: mask[:, :FIRST]}, (first,), mask[:, :FIRST] != 0),
        Step({TOKENS: later, MASK: mask}, (torch.stack([a[FIRST:], b[cut:]]),), continues=True),
        Step({TOKENS: tokens[2][None], MASK: torch.ones(1, 1, dtype=torch.long)}, (c[None],)),
    ]


def _module(captured: Captured, interface: Interface, examples: tuple[Any, ...] | None, size: int) -> Step:
    """size: of every symbolic dimension; 0: another for each."""
    generator = torch.Generator().manual_seed(SEED)
    open_sizes = [s for port in interface.inputs for s in port.shape if isinstance(s, str)]
    symbols = dict.fromkeys(t for s in open_sizes for t in terms(s) if not t.isdecimal())
    sizes = {s: size or 3 + 2 * i for i, s in enumerate(symbols)}
    given = [e for e in torch.utils._pytree.tree_leaves(examples or ()) if isinstance(e, Tensor)]
    ranges = dict(zip([p.name for p in interface.inputs], given, strict=False))
    inputs = {p.name: _random(p, sizes, ranges.get(p.name), generator) for p in interface.inputs}
    found = evaluate(captured.graph_module, list(inputs.values()), captured.read)
    return Step(inputs, tuple(found) if isinstance(found, (tuple, list)) else (found,))


def _random(port: Port, sizes: dict[str, int], example: Tensor | None, generator: torch.Generator) -> Tensor:
    """Normal numbers; integers within the range of the example's, 0 or 1 without one."""
    shape = [size_of(s, sizes) for s in port.shape]
    if port.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(port.dtype)
    low, high = (0, 1) if example is None or not example.numel() else (int(example.min()), int(example.max()))
    return torch.randint(low, high + 1, shape, generator=generator).to(port.dtype)


def tolerance_of(gm: GraphModule) -> float:
    """How far ONNX Runtime's answers may be from the graph's."""
    values = (n.meta.get("val") for n in gm.graph.nodes if n.op == "call_function")
    half = any(isinstance(v, Tensor) and v.dtype == torch.float16 for v in values)
    return TOLERANCE_F16 if half else TOLERANCE


def difference(steps: list[Step], others: list[Step]) -> float:
    """The greatest difference of floating outputs, relative to the greatest number of the other's."""
    worst = 0.0
    for step, other in zip(steps, others, strict=True):
        for one, expected in zip(step.expected, other.expected, strict=True):
            if expected.is_floating_point() and expected.numel():
                scale = float(expected.abs().max()) or 1.0
                worst = max(worst, float((one.double() - expected.double()).abs().max()) / scale)
    return worst


def check_same(steps: list[Step], others: list[Step], tolerance: float) -> None:
    """Raises: ExportError: the canonical graph answers something else than the captured one."""
    error = difference(steps, others)
    if not error <= tolerance:
        raise ExportError(
            f"the canonical graph differs from the captured one by {error:.1e} of the largest number (allowed "
            f"{tolerance:.0e}); nothing was written; this is a defect of moec, please report it"
        )


def compare(path: Path, interface: Interface, steps: list[Step], tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Runs a written model on the CPU provider -> the evidence record.

    Raises: ExportError: an output differs by more than the tolerance.  OnnxRuntimeError: the file cannot be loaded.
    """
    session = open_session(path)
    pasts: dict[str, np.ndarray] = {}
    worst = 0.0
    for number, step in enumerate(steps):
        rows = len(next(iter(step.inputs.values())))
        if not step.continues:
            pasts = {c.past.name: _empty(c.past, rows) for c in interface.caches}
        feed = {name: t.numpy() for name, t in step.inputs.items()} | pasts
        try:
            found = session.run(list(interface.outputs), feed)
        except Exception as error:  # its own exception types share no base class
            raise ExportError(
                f"{path.name}: ONNX Runtime fails in call {number}: {str(error).splitlines()[0]}"
            ) from error
        pasts = {c.past.name: found[1 + i] for i, c in enumerate(interface.caches)}
        for name, value, expected in zip(interface.outputs, found, step.expected, strict=False):
            worst = max(worst, _error(name, torch.from_numpy(value), expected, step.counts, tolerance))
    return {
        "calls": len(steps),
        "max_rel_err": worst,
        "tolerance": tolerance,
        "onnxruntime": onnxruntime_version(),
        "provider": session.get_providers()[0],
    }


def _empty(port: Port, rows: int) -> np.ndarray:
    shape = [rows, *(0 if isinstance(s, str) else s for s in port.shape[1:])]
    return torch.zeros(shape, dtype=port.dtype).numpy()


def _error(name: str, found: Tensor, expected: Tensor, counts: Tensor | None, tolerance: float) -> float:
    """The greatest difference, relative to the greatest expected number. Raises: ExportError: above the tolerance."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ExportError(
            f"{name}: expected {expected.dtype} {list(expected.shape)}, "
            f"ONNX Runtime gives {found.dtype} {list(found.shape)}"
        )
    if counts is not None:
        found, expected = found[counts], expected[counts]
    if not found.numel():
        return 0.0
    if not found.is_floating_point():
        return 0.0 if torch.equal(found, expected) else _refuse(name, 1.0, tolerance)
    scale = float(expected.abs().max()) or 1.0
    error = float((found.double() - expected.double()).abs().max()) / scale
    return error if error <= tolerance else _refuse(name, error, tolerance)


def _refuse(name: str, error: float, tolerance: float) -> float:
    raise ExportError(
        f"{name}: ONNX Runtime differs from the captured graph by {error:.1e} of the largest number (allowed "
        f"{tolerance:.0e}); nothing was written. Try the other --experts, and report it"
    )


def onnxruntime_version() -> str:
    """Of the package that is installed. Raises: OnnxRuntimeError: there is none."""
    from moec.compiler.export.onnx.session import onnxruntime

    return str(onnxruntime().__version__)
