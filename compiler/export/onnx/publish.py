"""Prepares a captured model and writes it: canonical form, translation, weights, checks, publishing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moec.compiler.capture.captured import Captured
from moec.compiler.export.onnx import microsoft
from moec.compiler.export.onnx.api import MICROSOFT
from moec.compiler.export.onnx.coverage import coverage
from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.onnx.file_weights import FileWeights, check_arithmetic, rounded
from moec.compiler.export.onnx.interface import Interface, interface_of
from moec.compiler.export.onnx.translate import Translated, translate
from moec.compiler.export.onnx.verify import Step, check_same, compare, difference, reference, tolerance_of
from moec.compiler.export.onnx.write import publishing, record_name, write_model
from moec.passes.infra.base import PassContext
from moec.passes.infra.runner import run_passes
from moec.passes.ir.formats import FormatError
from moec.passes.pipeline import CANONICALISE
from moec.runtime.format import write_json

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written. nodes: in the graph, functions not counted.  record: what FILE.json holds."""

    path: Path
    nodes: int
    record: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A canonical model, its interface, and what it answers with the numbers that the file will hold.

    tolerance: of ONNX Runtime's answers.  rounding: what --weights changed, for the record; empty where nothing did.
    """

    captured: Captured
    interface: Interface
    steps: list[Step]
    tolerance: float
    rounding: dict[str, Any]


def prepare(
    captured: Captured,
    examples: tuple[Any, ...] | None,
    progress: Progress,
    weights: FileWeights = FileWeights(),  # noqa: B008  (frozen)
) -> Prepared:
    """Asks the captured graph, then brings it into canonical form, in place, and rounds its weights.

    Raises: ExportError: a cache's kind; arithmetic or weights that the file cannot have.
    """
    interface = interface_of(captured)
    check_arithmetic(captured.graph_module)
    tolerance = tolerance_of(captured.graph_module)
    progress("reference", 0, 1)
    steps = reference(captured, interface, examples)
    progress("reference", 1, 1)
    progress("passes", 0, 1)
    result = run_passes(captured.graph_module, CANONICALISE, PassContext(read=captured.read), evidence="off")
    captured = dataclasses.replace(captured, graph_module=result.graph)
    if weights.rounds:
        check_same(reference(captured, interface, examples), steps, tolerance)
    captured = rounded(captured, weights)
    rounding: dict[str, Any] = {}
    if weights.rounds:
        before, steps = steps, _rounded_reference(captured, interface, examples)
        rounding = {"weights": str(weights), "max_rel_change": difference(steps, before)}
    progress("passes", 1, 1)
    return Prepared(captured, interface, steps, tolerance, rounding)


def _rounded_reference(captured: Captured, interface: Interface, examples: tuple[Any, ...] | None) -> list[Step]:
    """Raises: ExportError: a weight has a number that its format cannot hold."""
    try:
        return reference(captured, interface, examples)
    except FormatError as error:
        raise ExportError(f"weights cannot be stored as asked: {error}") from error


def publish(prepared: Prepared, output: Path, kind: str, opset: int, progress: Progress) -> ExportReport:
    """Translates, writes, checks and publishes. Raises: as export_onnx."""
    captured = prepared.captured
    progress("translate", 0, 1)
    translated = translate(captured, prepared.interface, kind, opset)
    _describe(translated, captured, kind)
    progress("translate", 1, 1)
    with publishing(output) as folder:
        file = folder / output.name
        write_model(translated.model, file, translated.recipes, captured.read, progress)
        progress("check", 0, 2)
        covered = coverage(file, translated.sites, captured.read)
        progress("check", 1, 2)
        evidence = compare(file, prepared.interface, prepared.steps, prepared.tolerance)
        progress("check", 2, 2)
        nodes = len(translated.model.graph)
        record: dict[str, Any] = {
            "experts": kind,
            "opset": opset,
            "nodes": nodes,
            "coverage": covered,
            "verified": evidence,
        }
        if prepared.rounding:
            record["rounding"] = prepared.rounding
        write_json(folder / record_name(output), record)
    return ExportReport(output, nodes, record)


def _describe(translated: Translated, captured: Captured, kind: str) -> None:
    """What a reader of the file wants to know, as metadata."""
    model = translated.model
    model.producer_name, model.producer_version = "moec", importlib.metadata.version("moec")
    facts = {
        "moec.model_type": captured.info.model_type,
        "moec.experts": kind,
        "moec.expert_layers": json.dumps([s.layer for s in translated.sites]),
        "moec.expert_weights": ", ".join(dict.fromkeys(s.stored_as for s in translated.sites)),
    }
    if kind == MICROSOFT and translated.sites:
        facts["moec.min_onnxruntime"] = microsoft.MIN_ONNXRUNTIME
    model.metadata_props.update(facts)
