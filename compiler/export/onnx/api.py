"""export_onnx(): a model as an ONNX file with the experts of a layer as one node, checked before it appears.

Nothing here imports an ONNX package before it is known to be installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from moec.compiler.api import capture_as
from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.onnx.session import onnxruntime
from moec.compiler.options import CompileOptions

if TYPE_CHECKING:
    from moec.compiler.export.onnx.publish import ExportReport

Progress = Callable[[str, int, int], None]
PORTABLE, MICROSOFT = "portable", "com.microsoft"
KINDS = (PORTABLE, MICROSOFT)
OPSETS = range(21, 26)
"""Of ai.onnx: those that were tried. Source: docs/onnx.md."""
NARROW = (torch.float16, torch.bfloat16)
PACKAGES = ("onnx", "onnx_ir")


def export_onnx(
    model: Any,
    path: str | Path,
    example_inputs: Sequence[Any] | None = None,
    *,
    experts: str = PORTABLE,
    opset: int = OPSETS.start,
    weights: str | None = None,
    layers: int | None = None,
    random_weights: int | None = None,
    trust_remote_code: bool = False,
    trust_pt2: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes a model as FILE, FILE.data and FILE.json; none of them appears unless ONNX Runtime agrees with the model.

    Args:
        model, example_inputs, layers, random_weights, trust_remote_code, trust_pt2: as for moec.compile.
        experts: "portable": a node of the domain `moec` whose body any runtime runs; "com.microsoft": that of ONNX
            Runtime.
        opset: of ai.onnx.
        weights: None, "f32"; "bf16" or "f16": matrices are stored so, and computed with in float32; "int4", "int8": the
            experts as codes; "model=bf16,experts=int4": both. See file_weights.py.
        progress: called with (stage, done, total).
    Raises: CompileError: the model cannot be captured, has no ONNX form (ExportError), or the packages are missing.
    """
    report = progress or (lambda stage, done, total: None)
    _check_options(experts, opset)
    from moec.compiler.export.onnx.file_weights import parse_file_weights
    from moec.compiler.export.onnx.publish import prepare, publish
    from moec.compiler.export.onnx.write import check_output

    stored, example_inputs = parse_file_weights(weights), _widened(model, example_inputs)
    output = check_output(Path(path))
    report("capture", 0, 1)
    options = CompileOptions.of("cpu", None if _has_own_dtype(model) else "f32", "off", None)
    captured = capture_as(model, example_inputs, layers, random_weights, options, trust_remote_code, trust_pt2)
    report("capture", 1, 1)
    prepared = prepare(captured, None if example_inputs is None else tuple(example_inputs), report, stored)
    return publish(prepared, output, experts, opset, report)


def _widened(model: Any, example_inputs: Sequence[Any] | None) -> Sequence[Any] | None:
    """The inputs of a module whose parameters are about to become float32: likewise, where they are as narrow."""
    if not isinstance(model, torch.nn.Module) or all(p.dtype not in NARROW for p in model.parameters()):
        return example_inputs
    narrow = lambda v: isinstance(v, torch.Tensor) and v.dtype in NARROW  # noqa: E731
    return tree_map(lambda v: v.float() if narrow(v) else v, example_inputs)


def _has_own_dtype(model: Any) -> bool:
    """Whether the model is a graph whose dtypes are fixed; others are captured in float32."""
    if isinstance(model, str | Path):
        return Path(model).suffix in (".onnx", ".pt2")
    return isinstance(model, torch.export.ExportedProgram)


def _check_options(kind: str, opset: int) -> None:
    """Raises: CompileError: an option without a meaning, or a package that is missing."""
    if kind not in KINDS:
        raise ExportError(f"experts={kind!r}; known: {', '.join(KINDS)}")
    if opset not in OPSETS:
        raise ExportError(f"opset={opset}; known: {OPSETS.start} to {OPSETS.stop - 1}")
    missing = [p.replace("_", "-") for p in PACKAGES if importlib.util.find_spec(p) is None]
    if missing:
        raise ExportError(f"writing ONNX needs the package {missing[0]}: pip install 'moec[onnx]'")
    onnxruntime()
