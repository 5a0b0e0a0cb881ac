"""export_onnx(): a model as an ONNX file with the experts of a layer as one node, checked before it appears."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moec.compiler.api import capture_as
from moec.compiler.capture.captured import Captured
from moec.compiler.export.onnx import experts as forms
from moec.compiler.export.onnx import microsoft
from moec.compiler.export.onnx.coverage import coverage
from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.onnx.interface import Interface, interface_of
from moec.compiler.export.onnx.session import onnxruntime
from moec.compiler.export.onnx.translate import Translated, translate
from moec.compiler.export.onnx.verify import compare, reference
from moec.compiler.export.onnx.write import check_output, publishing, record_name, write_model
from moec.compiler.options import CompileOptions
from moec.passes.infra.base import PassContext
from moec.passes.infra.runner import run_passes
from moec.passes.pipeline import CANONICALISE
from moec.runtime.format import write_json

Progress = Callable[[str, int, int], None]
OPSETS = range(21, 24)
"""Of ai.onnx: those that were tried. Source: docs/onnx.md."""
DTYPES = {"f32": torch.float32}


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written. nodes: in the graph, functions not counted.  record: what FILE.json holds."""

    path: Path
    nodes: int
    record: dict[str, Any]


def export_onnx(
    model: Any,
    path: str | Path,
    example_inputs: Sequence[Any] | None = None,
    *,
    experts: str = forms.PORTABLE,
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
        experts: "portable": a node of the domain `moec` whose body any runtime runs; "com.microsoft": ONNX Runtime's MoE.
        opset: of ai.onnx.  weights: "f32".
        progress: called with (stage, done, total).
    Raises: CompileError: the model cannot be captured, has no ONNX form (ExportError), or the packages are missing.
    """
    report = progress or (lambda stage, done, total: None)
    _check_options(experts, opset, weights)
    output = check_output(Path(path))
    report("capture", 0, 1)
    options = CompileOptions.of("cpu", weights, "off", None)
    captured = capture_as(model, example_inputs, layers, random_weights, options, trust_remote_code)
    return export_captured(captured, output, tuple(example_inputs or ()), experts, opset, report)


def export_captured(
    captured: Captured, output: Path, examples: tuple[Any, ...], kind: str, opset: int, progress: Progress
) -> ExportReport:
    """As export_onnx, of a captured model, whose graph is changed in place."""
    stages = ("capture", "reference", "passes", "translate", "weights", "coverage", "verify")

    def begin(stage: str) -> None:
        before = stages[stages.index(stage) - 1]
        progress(before, 1, 1)
        progress(stage, 0, 1)

    interface = interface_of(captured)
    begin("reference")
    steps = reference(captured, interface, examples)
    begin("passes")
    result = run_passes(captured.graph_module, CANONICALISE, PassContext(read=captured.read), evidence="off")
    captured = dataclasses.replace(captured, graph_module=result.graph)
    begin("translate")
    translated = translate(captured, interface, kind, opset)
    _describe(translated, captured, kind)
    begin("weights")
    with publishing(output) as folder:
        file = folder / output.name
        write_model(translated.model, file, translated.recipes, captured.read, progress)
        begin("coverage")
        covered = coverage(file, translated.sites, kind, captured.read)
        begin("verify")
        evidence = compare(file, interface, steps)
        nodes = len(translated.model.graph)
        record = {"experts": kind, "opset": opset, "nodes": nodes, "coverage": covered, "verified": evidence}
        write_json(folder / record_name(output), record)
    progress("verify", 1, 1)
    return ExportReport(output, nodes, record)


def _check_options(kind: str, opset: int, weights: str) -> None:
    """Raises: CompileError: an option without a meaning, or a package that is missing."""
    if kind not in forms.KINDS:
        raise ExportError(f"experts={kind!r}; known: {', '.join(forms.KINDS)}")
    if opset not in OPSETS:
        raise ExportError(f"opset={opset}; known: {OPSETS.start} to {OPSETS.stop - 1}")
    if weights not in DTYPES:
        raise ExportError(f"weights={weights!r}; ONNX files are written in {', '.join(DTYPES)}")
    for package in ("onnx", "onnx_ir", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ExportError(f"writing ONNX needs the package {package}: pip install 'moec[onnx]'") from error
    onnxruntime()


def _describe(translated: Translated, captured: Captured, kind: str) -> None:
    """What a reader of the file wants to know, as metadata."""
    model = translated.model
    model.producer_name, model.producer_version = "moec", importlib.metadata.version("moec")
    facts = {
        "moec.model_type": captured.info.model_type,
        "moec.experts": kind,
        "moec.expert_layers": json.dumps([s.layer for s in translated.sites]),
    }
    if kind == forms.MICROSOFT and translated.sites:
        facts["moec.min_onnxruntime"] = microsoft.MIN_ONNXRUNTIME
    model.metadata_props.update(facts)
