"""Writes an engine directory from a lowered model: whole or not at all, the same bytes for the same inputs."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moec.compiler.capture.captured import CacheSpec, Captured
from moec.compiler.export.rank_files import write_rank_weights
from moec.compiler.export.weights_file import write_weights
from moec.compiler.lowering.emit import Lowered
from moec.passes.infra.base import Ledger
from moec.passes.infra.evidence import Evidence
from moec.runtime.format import (
    EVIDENCE,
    FORMAT_VERSION,
    LEDGER,
    MANIFEST,
    PLAN,
    PROGRAM,
    TOKENIZER,
    TUNING,
    file_table,
    publish,
    weights_name,
    write_json,
)
from moec.runtime.loader import manifest_text

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler did and why, for people and for `inspect`.

    model: facts of the model (model_facts).  evidence, kernels: one JSON object per record.
    """

    model: dict[str, Any]
    ledgers: Mapping[str, Ledger]
    evidence: tuple[dict[str, Any], ...]
    kernels: tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class CudaFile:
    """A CUDA kernel to ship. symbol: as steps name it.  path: its cubin.  launch: CudaSource.launch()."""

    symbol: str
    path: Path
    launch: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """kind: "cpu" or "cuda". level: the instruction-set level of the kernels, None without kernels; the architecture.

    library: the built kernel library, None without kernels.  symbols: the functions that the program calls in it.
    cubins: of a GPU.
    """

    kind: str = "cpu"
    level: str | None = None
    library: Path | None = None
    symbols: tuple[str, ...] = ()
    cubins: tuple[CudaFile, ...] = ()

    def file_of(self, cubin: CudaFile) -> str:
        """A kernel's file in the engine folder."""
        return f"kernels-{self.level}-{cubin.symbol}.cubin"

    @property
    def library_name(self) -> str | None:
        """The library's file in the engine folder, None without kernels."""
        return f"kernels-{self.level}.so" if self.library else None


@dataclasses.dataclass(frozen=True)
class Placement:
    """How an engine's programs belong to ranks. plan: plan.json. record: the manifest's "placement".

    replicas: how often the programs, one per rank of a replica, stand in program.json; weights are stored once.
    """

    plan: dict[str, Any]
    record: dict[str, Any]
    replicas: int


def export_engine(
    output: Path,
    captured: Captured,
    lowered: Lowered | Sequence[Lowered],
    target: Target,
    report: Report,
    *,
    placement: Placement | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes the engine directory `output`. lowered: one, or one for each rank of a replica.

    Raises: OutputError: output exists, or cannot be written.  CheckpointError: a tensor is missing.
    """
    ranks = [lowered] if isinstance(lowered, Lowered) else list(lowered)
    replicas = placement.replicas if placement else 1

    def fill(folder: Path) -> None:
        program: dict[str, Any] = {"ranks": [one.program.to_json() for one in ranks] * replicas}
        if target.kind == "cuda":
            program["kernels"] = {c.symbol: {"file": target.file_of(c), "launch": c.launch} for c in target.cubins}
        write_json(folder / PROGRAM, program)
        for cubin in target.cubins:
            shutil.copyfile(cubin.path, folder / target.file_of(cubin))
        stage = functools.partial(progress, "weights") if progress else None
        if len(ranks) == 1:
            write_weights(folder / weights_name(0), ranks[0].weights, captured.read, stage)
        else:
            files = [folder / weights_name(rank) for rank in range(len(ranks))]
            write_rank_weights(files, [one.weights for one in ranks], captured.read, stage)
        if placement is not None:
            write_json(folder / PLAN, placement.plan)
        write_json(folder / LEDGER, {name: ledger_json(ledger) for name, ledger in report.ledgers.items()})
        write_json(folder / EVIDENCE, list(report.evidence))
        write_json(folder / TUNING, {"kernels": list(report.kernels)})
        if target.library is not None and target.library_name is not None:
            shutil.copyfile(target.library, folder / target.library_name)
        tokenizer = captured.info.directory and captured.info.directory / TOKENIZER
        if tokenizer and tokenizer.is_file():
            shutil.copyfile(tokenizer, folder / TOKENIZER)
        manifest = {**_manifest(captured, target, report), "files": file_table(folder)}
        if placement is not None:
            manifest |= {"ranks": len(ranks) * replicas, "placement": placement.record}
        (folder / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")

    publish(output, fill)


def _manifest(captured: Captured, target: Target, report: Report) -> dict[str, Any]:
    info = captured.info
    return {
        "format_version": FORMAT_VERSION,
        "moec_version": importlib.metadata.version("moec"),
        "kind": captured.kind,
        "model": report.model,
        "target": {
            "kind": target.kind,
            "level": target.level,
            "library": target.library_name,
            "symbols": list(target.symbols),
        },
        "weights": str(info.dtype).removeprefix("torch."),
        "ranks": 1,
        "caches": [cache_json(c) for c in info.caches],
    }


def cache_json(cache: CacheSpec) -> dict[str, Any]:
    """A cache as the manifest holds it."""
    fields = dataclasses.asdict(cache)
    return {**fields, "shape": list(cache.shape), "dtype": str(cache.dtype).removeprefix("torch.")}


def ledger_json(ledger: Ledger) -> dict[str, Any]:
    """A pass's ledger as the command line prints it."""
    return {
        "sites": ledger.sites,
        "matched": len(ledger.matched),
        "refused": [dataclasses.asdict(r) for r in ledger.refused],
    }


def evidence_json(record: Evidence) -> dict[str, Any]:
    """One piece of evidence as the command line prints it; max_rel_err is None where a region was not evaluated."""
    fields = dataclasses.asdict(record)
    return {"pass": fields.pop("pass_name"), **fields}
