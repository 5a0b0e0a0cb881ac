"""compile(): capture, passes, lowering and export in one call."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from moec.compiler.calibration import weight_plan
from moec.compiler.capture import capture
from moec.compiler.capture.captured import Captured
from moec.compiler.capture.kv_cache import with_kv_cache
from moec.compiler.codegen.llvm import build_library
from moec.compiler.errors import CompileError
from moec.compiler.export.engine import Report, Target, evidence_json, export_engine
from moec.compiler.export.model_facts import gate_of, model_facts
from moec.compiler.export.weight_sizes import stored_sizes
from moec.compiler.lowering.emit import Lowered, lower
from moec.compiler.lowering.tuned import Tuning, tuning_ledger
from moec.compiler.options import CompileOptions, temporary_folder
from moec.passes.infra.base import Ledger, PassContext
from moec.passes.infra.errors import PassError
from moec.passes.infra.runner import PipelineResult
from moec.passes.ir.formats import FormatError
from moec.passes.pipeline import run_pipeline
from moec.passes.quantise_weights import QuantiseWeights
from moec.runtime.engine import Engine, load
from moec.runtime.format import check_output

Progress = Callable[[str, int, int], None]


class CompileSettings(TypedDict, total=False):
    """The keywords of compile_model that compile_to takes as well, where their defaults stand."""

    target: str
    weights: str | None
    layers: int | None
    random_weights: int | None
    trust_remote_code: bool
    trust_pt2: bool
    kv_cache: str | None
    verify: str
    dump: str | Path | None
    tune_db: str | Path | None
    combine: str
    progress: Progress | None


def compile_model(
    model: Any,
    example_inputs: Sequence[Any] | None = None,
    *,
    output: str | Path | None = None,
    **settings: Unpack[CompileSettings],
) -> Engine:
    """Compiles a model into an engine and loads it.

    Args:
        model: a Hugging Face directory, a transformers causal language model, any torch.nn.Module, or a
            torch.export.ExportedProgram, in memory or as a .pt2 file, or an ONNX file.
        example_inputs: of a plain module: the tensors of one call.
        target: "cpu" (this machine), one CPU level: "cpu:avx2", "cpu:avx512", "cpu:amx", or a GPU, which this machine
            need not have to write the engine: "cuda:sm_80", "cuda:sm_89", "cuda:sm_90a", "cuda:sm_100a",
            "cuda:sm_120a".
        weights: "f32" or "bf16", a format for the experts ("int4"), formats by kind of weight ("experts=int4-g64,
            attention=int8"), or a size ("auto:8GB", "auto:3.0bits"); see compiler/weights_option.py, docs/formats.md.
            None: everything as the model has it.
        layers, random_weights: of a directory: keep the first layers only; random weights from this seed.
        trust_remote_code: of a directory: import the code that its config.json names (auto_map), and use it.
        trust_pt2: of a .pt2 file: read it, though torch.export.load may unpickle what is inside.
        kv_cache: "int8" keeps keys and values as codes, a scale for each token and head; None: in the model's dtype.
        verify: how many rewrites are evaluated before and after: "off", "sampled" (one per kind), "full".
        dump: a folder for the graph's text before and after each pass.
        tune_db: a tuning database (moec.tune), whose configurations the expert kernels take; docs/tuning.md.
        combine: of a GPU: "ordered" sums experts in one order, "fast" by atomics, whose last bits differ between runs.
        progress: called with (stage, done, total).
        output: the engine directory to write; None: a temporary one that goes with the engine (Engine.save keeps it).
    Raises: CompileError, PassError, EngineError (OutputError: output exists; it is kept as it is).
    """
    folder = None
    if output is None:
        folder = tempfile.TemporaryDirectory(prefix="moec-", dir=temporary_folder())
        output = Path(folder.name) / "engine"
    compile_to(model, output, example_inputs, **settings)
    engine = load(output)
    return engine if folder is None else engine.keep(folder)


def compile_to(
    model: Any,
    output: str | Path,
    example_inputs: Sequence[Any] | None = None,
    *,
    target: str = "cpu",
    weights: str | None = None,
    layers: int | None = None,
    random_weights: int | None = None,
    trust_remote_code: bool = False,
    trust_pt2: bool = False,
    kv_cache: str | None = None,
    verify: str = "sampled",
    dump: str | Path | None = None,
    tune_db: str | Path | None = None,
    combine: str = "ordered",
    progress: Progress | None = None,
) -> None:
    """compile_model without loading the engine: it may be for another machine, and its weights stay on the disk.

    Arguments and errors as compile_model's.
    """
    options, output = CompileOptions.of(target, weights, verify, dump, tune_db, combine), Path(output)
    check_output(output.absolute())
    report = progress or quiet
    report("capture", 0, 1)
    captured = capture_as(model, example_inputs, layers, random_weights, options, trust_remote_code, trust_pt2)
    captured = with_kv_cache(captured, kv_cache)
    report("capture", 1, 1)
    build(captured, options, output, report, example_inputs)


def capture_as(
    model: Any,
    example_inputs: Sequence[Any] | None,
    layers: int | None,
    random_weights: int | None,
    options: CompileOptions,
    trust_remote_code: bool = False,
    trust_pt2: bool = False,
) -> Captured:
    """Captures with the options' dtype. A module in memory of another dtype is copied, its parameters cast."""
    dtype = options.dtype
    if dtype is not None and isinstance(model, torch.nn.Module):
        model, dtype = cast_parameters(model, dtype), None
    return capture(
        model,
        example_inputs,
        layers=layers,
        random_weights=random_weights,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        trust_pt2=trust_pt2,
    )


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model itself where its parameters are of that dtype, else a copy with them cast; buffers keep their dtype."""
    if all(p.dtype == dtype for p in model.parameters() if p.is_floating_point()):
        return model
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.data = p.data.to(dtype) if p.is_floating_point() else p.data
    return model


def quiet(stage: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""


def build(
    captured: Captured,
    options: CompileOptions,
    output: Path,
    progress: Progress,
    example_inputs: Sequence[Any] | None = None,
) -> None:
    """Passes, lowering and export of a captured model. Raises: as compile_model."""
    facts = model_facts(captured)
    captured, result, lowered = lowered_of(captured, options, progress, example_inputs)
    facts["gate"] = gate_of(result.graph.graph)
    facts["stored_bytes"] = stored_sizes(lowered.weights.values())
    evidence = (*captured.certificates, *(evidence_json(e) for e in result.evidence))
    ledgers = with_tuning(result.ledgers, [lowered], options)
    report = Report(facts, ledgers, evidence, tuple(c.record() for c in lowered.choices))
    (lowered,), target = with_kernels([lowered], options, progress)
    export_engine(output, captured, lowered, target, report, progress=progress)


def lowered_of(
    captured: Captured,
    options: CompileOptions,
    progress: Progress,
    example_inputs: Sequence[Any] | None = None,
) -> tuple[Captured, PipelineResult, Lowered]:
    """Passes, in place, and lowering of a captured model. Raises: CompileError, PassError."""
    progress("passes", 0, 1)
    plan = weight_plan(options.weights, captured, example_inputs)
    context = PassContext(read=captured.read, options={QuantiseWeights.name: plan})
    with format_errors():
        result = run_pipeline(
            captured.graph_module,
            context,
            evidence=options.verify,
            dump=_writer(options.dump) if options.dump else None,
        )
    captured = dataclasses.replace(captured, graph_module=result.graph)
    progress("passes", 1, 1)
    progress("lower", 0, 1)
    lowered = lower(captured, options.level, options.arch, tuning_of(options), options.combine == "fast")
    progress("lower", 1, 1)
    return captured, result, lowered


def tuning_of(options: CompileOptions) -> Tuning | None:
    """The tuning database that the options name, as their target asks it. Raises: DatabaseError, ToolchainError.

    CompileError: a target without kernels.
    """
    if options.tune_db is None:
        return None
    if options.arch is not None:
        from moec.compiler.tune.cuda_lookup import CudaTuning

        return CudaTuning(options.tune_db, options.arch)
    if options.level is None:
        raise CompileError("tune_db configures kernels, and this processor has none of ours; leave it out")
    from moec.compiler.tune.lookup import DatabaseTuning

    return DatabaseTuning(options.tune_db, options.level)


def with_tuning(ledgers: dict[str, Ledger], lowered: Sequence[Lowered], options: CompileOptions) -> dict[str, Ledger]:
    """The passes' ledgers, and what the tuning database did at each site of the programs where there is one."""
    if options.tune_db is None:
        return ledgers
    asked = [(c.site, c.tuned, c.untuned) for one in lowered for c in one.choices if c.tuned or c.untuned]
    return {**ledgers, "tune-kernels": tuning_ledger(asked)}


@contextmanager
def format_errors() -> Iterator[None]:
    """Around passes: a format that does not fit what it is asked for is no pass's fault. Raises: CompileError."""
    try:
        yield
    except PassError as error:
        if isinstance(error.__cause__, FormatError):
            raise CompileError(f"weights cannot be stored as asked: {error.__cause__}") from error
        raise


def with_kernels(
    lowered: Sequence[Lowered], options: CompileOptions, progress: Progress
) -> tuple[list[Lowered], Target]:
    """The programs of all ranks as the kernels want them, and the kernels, built once for all.

    Raises: ToolchainError: a compiler is missing.  SharedMemoryError: a CUDA kernel does not fit its device.
    """
    if options.arch is None:
        together = {s: c for one in lowered for s, c in one.kernels.items()}
        return list(lowered), build_kernels(dataclasses.replace(lowered[0], kernels=together), options, progress)
    from moec.compiler.lowering.cuda.build import build_target

    progress("kernels", 0, 1)
    fitted, target = build_target(lowered, options.arch, options.cache_dir)
    progress("kernels", 1, 1)
    return fitted, target


def build_kernels(lowered: Lowered, options: CompileOptions, progress: Progress) -> Target:
    """The kernels that the program calls, as a library in the cache. Raises: ToolchainError: no C compiler."""
    if options.level is None or not lowered.kernels:
        return Target()
    progress("kernels", 0, 1)
    functions: dict[str, Any] = {}
    for candidate in lowered.kernels.values():
        if candidate.functions is not None and not functions.keys() >= set(candidate.symbols):
            functions |= candidate.functions()
    built = build_library(functions, options.level, options.cache_dir)
    progress("kernels", 1, 1)
    return Target("cpu", built.level, built.path, tuple(sorted(functions)))


def _writer(folder: Path) -> Callable[[str, str], None]:
    """A dump callback that writes <folder>/<title>.txt. Raises: CompileError: the folder cannot be made or written."""

    def write(title: str, text: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{title}.txt").write_text(text, encoding="utf-8")
        except OSError as error:
            raise CompileError(f"dump folder {folder}: {error.strerror}; choose another with --dump") from error

    return write
