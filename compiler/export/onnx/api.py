"""export_onnx(): a model as an ONNX file with the experts of a layer as one node, checked before it appears.

Nothing here imports an ONNX package before it is known to be installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
WEIGHTS = ("f32",)
PACKAGES = ("onnx", "onnx_ir")


def export_onnx(
    model: Any,
    path: str | Path,
    example_inputs: Sequence[Any] | None = None,
    *,
    experts: str = PORTABLE,
    opset: int = OPSETS.start,
    weights: str = "f32",
    layers: int | None = None,
    random_weights: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes a model as FILE, FILE.data and FILE.json; none of them appears unless ONNX Runtime agrees with the model.

    Args:
        model, example_inputs, layers, random_weights, trust_remote_code: as for moec.compile.
        experts: "portable": a node of the domain `moec` whose body any runtime runs; "com.microsoft": that of ONNX
            Runtime.
        opset: of ai.onnx.  weights: "f32".
        progress: called with (stage, done, total).
    Raises: CompileError: the model cannot be captured, has no ONNX form (ExportError), or the packages are missing.
    """
    report = progress or (lambda stage, done, total: None)
    _check_options(experts, opset, weights)
    from moec.compiler.export.onnx.publish import prepare, publish
    from moec.compiler.export.onnx.write import check_output

    output = check_output(Path(path))
    report("capture", 0, 1)
    options = CompileOptions.of("cpu", weights, "off", None)
    captured = capture_as(model, example_inputs, layers, random_weights, options, trust_remote_code)
    report("capture", 1, 1)
    prepared = prepare(captured, None if example_inputs is None else tuple(example_inputs), report)
    return publish(prepared, output, experts, opset, report)


def _check_options(kind: str, opset: int, weights: str) -> None:
    """Raises: CompileError: an option without a meaning, or a package that is missing."""
    if kind not in KINDS:
        raise ExportError(f"experts={kind!r}; known: {', '.join(KINDS)}")
    if opset not in OPSETS:
        raise ExportError(f"opset={opset}; known: {OPSETS.start} to {OPSETS.stop - 1}")
    if weights not in WEIGHTS:
        raise ExportError(f"weights={weights!r}; ONNX files are written in {', '.join(WEIGHTS)}")
    missing = [p.replace("_", "-") for p in PACKAGES if importlib.util.find_spec(p) is None]
    if missing:
        raise ExportError(f"writing ONNX needs the package {missing[0]}: pip install 'moec[onnx]'")
    onnxruntime()
