"""Captures any torch.nn.Module whose forward torch.export can trace, leading (token) dimensions symbolic from 1 up."""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as fx_config
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

import moec.passes.ir.ops  # noqa: F401  (registers torch.ops.moec)
from moec.compiler.capture.captured import Captured, ModelInfo
from moec.compiler.capture.compare import DynamicDims, compare, each_dim, resized
from moec.compiler.capture.graph import adopt, expert_layers, small_size_guards, symbol_names
from moec.compiler.capture.lifting import Swapped, refusal_texts, swap_blocks
from moec.compiler.capture.refusal import refusal
from moec.compiler.capture.seams import seams
from moec.compiler.capture.tensors import constants_of, named_tensors, sources_of
from moec.compiler.errors import CompileError, UnsupportedModel

MAX_SIZE = 1 << 20
TRACED_SIZE = 5  # for dimensions of which the example has one or none: a trace needs a size that is not special
LETTERS = ("T", "S", "U", "V", "W")


def capture_module(module: nn.Module, example_inputs: tuple[Any, ...], symbolic: DynamicDims | None = None) -> Captured:
    """Captures a module from the inputs of one call, in evaluation mode.

    symbolic: which dimensions may vary, by name. None: all of integer inputs and all but the last of floating ones;
    equal sizes are one symbol. The graph is then compared with the module at other sizes, 1 among them: a branch on a
    size never passes unnoticed.
    Where the trace fails, or has sizes that follow from values (a loop over experts), MoE blocks are lifted first.
    Raises: UnsupportedModel: it cannot be traced soundly.  CompileError: an input that is neither tensor nor constant.
    """
    names, flat = _flatten(module, example_inputs)
    try:
        captured = _captured(module, module, names, flat, example_inputs, None, symbolic)
        swapped = _lifted(module, example_inputs) if _sizes_follow_values(captured) else None
        if swapped is None or not swapped.certificates:
            return captured
        return _captured(module, swapped.model, names, flat, example_inputs, swapped, symbolic)
    except (UnsupportedModel, RuntimeError, ValueError, IndexError) as error:  # the last three: its graph fails to run
        swapped = _lifted(module, example_inputs)
        if swapped is None:
            raise
        if not swapped.certificates:
            raise UnsupportedModel("; ".join([str(refusal(module, error)), *refusal_texts(swapped)])) from error
        return _captured(module, swapped.model, names, flat, example_inputs, swapped, symbolic)


def _sizes_follow_values(captured: Captured) -> bool:
    nodes = captured.graph_module.graph.nodes
    return any(free_unbacked_symbols(v) for n in nodes for v in pytree.tree_leaves(n.meta.get("val")) if v is not None)


def _lifted(module: nn.Module, inputs: tuple[Any, ...]) -> Swapped | None:
    """The module with its MoE blocks lifted; None where it does not run on the inputs, or has no values."""
    if any(
        t.is_meta for t in [*module.parameters(), *(v for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor))]
    ):
        return None
    with _evaluation(module), torch.no_grad():
        try:
            return swap_blocks(module, inputs)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return None


def _captured(
    module: nn.Module,
    traced: nn.Module,
    names: list[str],
    flat: list[Any],
    example_inputs: tuple[Any, ...],
    swapped: Swapped | None,
    symbolic: DynamicDims | None,
) -> Captured:
    """Captures `traced` (the module, or its copy with lifted blocks) and compares the graph with the module."""
    with _evaluation(traced), torch.no_grad(), seams(traced, attentions=False):
        program, dims = _export_any(traced, example_inputs, flat, symbolic)
        tensors = constants_of(program) | dict(named_tensors(module)) | (swapped.tensors if swapped else {})
        gm = adopt(program, names, sources_of(tensors) | (swapped.weights if swapped else {}))
        letters = {(names[i], d): letter for i, ds in dims.items() for d, letter in ds.items()}
        symbols = symbol_names(gm, letters)
        captured = Captured(
            graph_module=gm,
            kind="module",
            info=ModelInfo(model_type=type(module).__name__, dtype=_dtype(module)),
            read=lambda name: tensors[name].detach(),
            moe_layers=expert_layers(gm),
            symbols=symbols,
            guards=small_size_guards(program),
            certificates=swapped.certificates if swapped else (),
        )
    with _evaluation(module):
        compare(module, captured, example_inputs, dims)
    return captured


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), torch.float32)


@contextlib.contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode while it lasts; every submodule's own mode is put back."""
    before = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in before:
            m.training = training


def _flatten(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[str], list[Any]]:
    """Names and values of the inputs, containers taken apart."""
    parameters = list(inspect.signature(module.forward).parameters)
    names: list[str] = []
    flat: list[Any] = []
    for i, value in enumerate(inputs):
        leaves = pytree.tree_leaves(value)
        stem = parameters[i] if i < len(parameters) else f"input_{i}"
        names += [stem] if leaves == [value] or len(leaves) == 1 else [f"{stem}_{k}" for k in range(len(leaves))]
        flat += leaves
    for name, value in zip(names, flat, strict=True):
        if not isinstance(value, Tensor | int | float | bool | str | None):
            raise CompileError(f"example input {name}: expected a tensor or a constant, got a {type(value).__name__}")
    return names, flat


def _dynamic(flat: Sequence[Any], by_position: bool) -> DynamicDims:
    """Names the symbolic dimensions: equal sizes (at equal positions, where by_position) share a name."""
    named: dict[Any, str] = {}
    dims: DynamicDims = {}
    for i, value in enumerate(flat):
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        last = value.dim() - (1 if value.dtype.is_floating_point and value.dim() > 1 else 0)
        for d in range(last):
            key = (value.shape[d], d) if by_position else value.shape[d]
            if key not in named:
                named[key] = LETTERS[len(named)] if len(named) < len(LETTERS) else f"D{len(named)}"
            dims.setdefault(i, {})[d] = named[key]
    return dims


def _has_twins(flat: Sequence[Any], dims: DynamicDims) -> bool:
    return any(len({flat[i].shape[d] for d in ds}) < len(ds) for i, ds in dims.items())


def _export_any(
    module: nn.Module, inputs: tuple[Any, ...], flat: list[Any], symbolic: DynamicDims | None
) -> tuple[ExportedProgram, DynamicDims]:
    """Exports with independent dimensions; where an input is square, with equal ones if that fails.

    Some ops (einsum) look whether a size is 1 without depending on it, which a range from 1 up does not allow. Then the
    trace takes sizes from 2 up, and the comparison that follows has to show that it holds for 1.
    """
    apart = _dynamic(flat, by_position=_has_twins(flat, _dynamic(flat, by_position=False)))
    apart = apart if symbolic is None else symbolic
    attempts = [(apart, 1)]
    if not any(t.is_meta for t in module.parameters()):
        attempts.append((apart, 2))
    if symbolic is None and _has_twins(flat, apart):
        attempts += [(_dynamic(flat, by_position=False), smallest) for _, smallest in attempts]
    first: Exception | None = None
    for dims, smallest in attempts:
        try:
            return _export(module, inputs, flat, dims, smallest), dims
        except Exception as error:  # whatever the module's own code raises under a trace
            first = first or error
    assert first is not None
    raise refusal(module, first) from first


def _export(
    module: nn.Module, inputs: tuple[Any, ...], flat: list[Any], dims: DynamicDims, smallest: int
) -> ExportedProgram:
    made = {n: Dim(n, min=smallest, max=MAX_SIZE) for ds in dims.values() for n in ds.values()}
    sizes = {n: max(2, flat[i].shape[d]) if flat[i].shape[d] > 1 else TRACED_SIZE for i, d, n in each_dim(dims)}
    values = [resized(v, dims.get(i, {}), sizes) for i, v in enumerate(flat)]
    shapes = [{d: made[n] for d, n in dims[i].items()} if i in dims else None for i in range(len(flat))]
    _, spec = pytree.tree_flatten(inputs)
    printed = io.StringIO()  # a trace that fails prints the whole graph; the error that it raises says enough
    with fx_config.patch(backed_size_oblivious=True), contextlib.redirect_stderr(printed):  # type: ignore[attr-defined]
        program = torch.export.export(
            module,
            pytree.tree_unflatten(values, spec),
            dynamic_shapes=pytree.tree_unflatten(shapes, spec),
            strict=False,
        )
    sys.stderr.write(printed.getvalue())
    return program
