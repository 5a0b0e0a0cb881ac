"""`moec tune MODEL --bundle DIR` and `--import FILE`: tuning for a device that is not here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from moec.compiler.terminal import print_json, progress_bar
from moec.compiler.tune.errors import TuneError


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """What `moec tune` was asked for. bundle: folder to write. results: file to take. trials: of each GEMM."""

    model: str
    db: Path
    target: str
    bundle: Path | None
    results: Path | None
    trace: Path | None
    zipf: float
    tokens: tuple[int, ...]
    trials: int
    seed: int
    trust_remote_code: bool
    as_json: bool


def tune_elsewhere(asked: Elsewhere) -> None:
    """Writes a bundle, or takes the results of one. Raises: TuneError: both were asked for; and as the two."""
    if asked.bundle is not None and asked.results is not None:
        raise TuneError("--bundle and --import: first build, measure there, then import; give one of them")
    told = _build(asked, asked.bundle) if asked.bundle is not None else _take(asked)
    if asked.as_json:
        print_json(told)
    else:
        Console().print(told["text"], soft_wrap=True, highlight=False)


def _take(asked: Elsewhere) -> dict[str, Any]:
    from moec.compiler.tune.bundle_results import import_results
    from moec.compiler.tune.database import Database

    if asked.results is None:
        raise TuneError("give --bundle DIR to build, or --import FILE to take results")
    with Database(asked.db) as database:
        merged = import_results(database, asked.results)
    counts = f"{merged.added} new records, {len(merged.conflicts)} problems with two winners"
    text = f"{asked.results}: {counts}; database: {asked.db}"
    return {"added": merged.added, "conflicts": len(merged.conflicts), "text": text}


def _build(asked: Elsewhere, out: Path) -> dict[str, Any]:
    from moec.compiler.options import cache_folder
    from moec.compiler.tune.bundle_model import bundle_model
    from moec.compiler.tune.routing import read_trace, zipf

    routing = zipf(asked.zipf) if asked.trace is None else read_trace(asked.trace)
    with progress_bar(asked.as_json) as progress:
        manifest = bundle_model(
            asked.model, asked.target, out, routing, asked.tokens, cache_folder(), db=asked.db, candidates=asked.trials,
            seed=asked.seed, trust_remote_code=asked.trust_remote_code, progress=progress,
        )  # fmt: skip
    count, problems = len(manifest["candidates"]), len(manifest["problems"])
    text = (
        f"{count} candidates for {problems} problems, {len(manifest['rejected'])} rejected. Carry {out} to the GPU, "
        f"run `python {out.name}/run.py` there, then `moec tune import {out.name}/results.jsonl --db {asked.db}` here"
    )
    return {"bundle": str(out), "candidates": count, "problems": problems, "text": text}
