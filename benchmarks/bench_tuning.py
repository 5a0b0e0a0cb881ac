"""What tuning is worth: MoE layers tuned and as they come, with two seeds, and a recorded trace against uniform.

    python benchmarks/bench_tuning.py [--shape NAME,..] [--tokens 1,4,..] [--minutes M] [--json F]

Part one tunes each shape at each token count twice, with two seeds and two databases. Afterwards, on inputs that no
search has seen, the first winner is timed in turn with the default, and the two winners in turn with each other.
    regression   the 95 % bound of the tuned time over the default's lies above 1
    agreement    both seeds chose the same configuration, or the bound of their ratio holds 1, or it is within 2 %
    others       the median candidate's time over the default's, of those that the first search measured
    at most      the default's time over the least that the machine allows: for the bytes of the experts in use at the
                 rate of a plain read, or for all operations at the rate of products alone (machine_rates.py)
Part two records the routing of the tiny model of examples/ on one text, tunes its layer on it and on uniform routing,
and times both on the routing of another text. Exit code 1 where a target is missed: a regression, a mean
gain below 1.15x, agreement below 95 %, or the trace's winner slower than uniform's. docs/tuning.md says more.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from machine_rates import Rates, measure_rates
from moe_layers import SHAPES
from results_file import write_json
from rich.console import Console
from rich.table import Table
from tuning_trace import TraceResult, trace_against_uniform

from moec.compiler.codegen.llvm import build_library, default_cache_dir
from moec.compiler.kernels.experts import knobs
from moec.compiler.kernels.spec import ExpertsProblem
from moec.compiler.tune.api import FACTORY, Job, jobs_of, run_jobs
from moec.compiler.tune.experts import input_seeds
from moec.compiler.tune.measure import Effort, Measurer
from moec.compiler.tune.record import config_hash
from moec.compiler.tune.routing import Routing, zipf
from moec.compiler.tune.search import CONFIRM, SCREEN, Event, Outcome, Settings
from moec.compiler.tune.space import experts_space
from moec.compiler.tune.statistics import Ratio, geometric_mean
from moec.compiler.tune.subject import SubjectSpec
from moec.runtime.launch.cpu_features import best_level

TARGET_GAIN, TARGET_AGREEMENT, NOISE = 1.15, 0.95, 0.02
ORDER = (512, 2048, 64, 16, 4, 1)  # the counts that have most to choose come first, the others learn from them
SHARE = {512: 1.4, 2048: 2.2}  # of a cell's time budget
FRESH_SEED = 1000  # of the inputs of the final comparison
SEARCH_SHARE = 0.6  # of all minutes; the rest is for building, for comparing winners and for making weights
console = Console(width=None if sys.stdout.isatty() else 140)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One shape and token count. gain: default over tuned; low, high: its 95 % bound. 1 where the default won.

    default_us: the default's time. others: the median candidate's time over the default's; 1 without any.
    at_most: the gain of a kernel that takes the least time that the machine allows.
    """

    shape: str
    tokens: int
    config: dict[str, Any]
    other_config: dict[str, Any]
    default_us: float
    others: float
    at_most: float
    gain: float
    low: float
    high: float
    pairs: int
    agree: bool
    between: float
    note: str
    tried: int
    failed: int

    @property
    def is_regression(self) -> bool:
        """Whether the bound says that tuned is slower."""
        return self.high < 1.0


def problem_of(name: str) -> ExpertsProblem:
    """The shape's experts, as bench_moe_layer.py runs them."""
    s = SHAPES[name]
    return ExpertsProblem(s.hidden, s.inner, s.experts, s.top_k, s.num_shared, "silu", "bfloat16")


def build_one(problem: ExpertsProblem, level: str, config: dict[str, Any]) -> None:
    """Puts a candidate's library into the cache."""
    build_library(knobs.configured(config).build(problem), level, default_cache_dir())


def build_ahead(names: list[str], level: str, tokens: list[int]) -> None:
    """What every search begins with, on all processors, before anything is timed: a build takes seconds."""
    wanted: dict[tuple[str, str], dict[str, Any]] = {}
    for name in names:
        for count in tokens:
            space = experts_space(problem_of(name), level, count)
            for config in (*space.beginnings, *(b.default for b in space.branches)):
                wanted[name, config_hash(config)] = config
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        built = [pool.submit(build_one, problem_of(name), level, c) for (name, _), c in wanted.items()]
        with console.status(f"building {len(built)} candidates"):
            for future in built:
                future.result()


def jobs_for(problem: ExpertsProblem, level: str, routing: Routing, tokens: list[int], seed: int) -> list[Job]:
    """Those of a shape, in ORDER."""
    jobs = {job.key.tokens: job for job in jobs_of([problem], level, routing, tokens, seed)}
    order = [t for t in ORDER if t in jobs] + [t for t in jobs if t not in ORDER]
    return [dataclasses.replace(jobs[t], share=SHARE.get(t, 0.6)) for t in order]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search came to. ratios: of the candidates that it measured, their times over the default's."""

    outcome: Outcome
    ratios: list[float]


def tuned(jobs: list[Job], folder: Path, name: str, settings: Settings) -> dict[int, Found]:
    """By token count."""
    ratios: dict[int, list[float]] = {}

    def show(event: Event) -> None:
        if event.kind == "measured" and event.record and event.record.ratio and not event.record.is_default:
            ratios.setdefault(event.key.tokens, []).append(event.record.ratio)
        if event.kind == "end":
            best = (
                f"{1 / (event.record.ratio or 1):.3f}x" if event.record and not event.record.is_default else "default"
            )
            console.print(
                f"[dim]{name} seed {settings.seed} T={event.key.tokens}: {best}, {event.done - 1} tried[/dim]"
            )

    outcomes = run_jobs(jobs, default_cache_dir(), folder / f"{name}-{settings.seed}.db", settings, show=show)
    return {o.key.tokens: Found(o, ratios.get(o.key.tokens, [])) for o in outcomes}


def least_us(job: Job, rates: Rates) -> float:
    """The mean over the sets of the final comparison's inputs, which differ in the experts that they take."""
    p, routing = job.problem, Routing.from_json(job.task["routing"])
    values, count = 3 * p.inner * p.hidden, job.key.tokens
    flops = 2.0 * count * (p.top_k + p.num_shared) * values
    used = [routing.sample(count, p.num_experts, p.top_k, seed).unique().numel() for seed in input_seeds(FRESH_SEED)]
    return statistics.fmean(rates.least_us((n + p.num_shared) * values * 2, flops) for n in used)


def compared(
    name: str, jobs: list[Job], first: dict[int, Found], second: dict[int, Found], effort: Effort, rates: Rates
) -> list[Cell]:
    """The winners on fresh inputs, against the default and against each other."""
    job = jobs[0]
    arguments = {
        "problem": dataclasses.asdict(job.problem), "level": job.level, "cache_dir": str(default_cache_dir())
    }  # fmt: skip
    cells = []
    with Measurer(SubjectSpec(FACTORY, arguments)) as measurer:
        for job in sorted(jobs, key=lambda j: j.key.tokens):
            found = first[job.key.tokens]
            a, b = found.outcome.winner, second[job.key.tokens].outcome.winner
            default = experts_space(job.problem, job.level, job.key.tokens).default
            scaled = dataclasses.replace(effort, budget_s=effort.budget_s * job.share)
            measurer.prepare({**job.task, "seed": FRESH_SEED})
            against, note, default_us = _ratio(measurer, a.config, default, scaled)
            between, _, _ = _ratio(measurer, b.config, a.config, scaled)
            default_us = default_us or a.median_us or math.nan
            agree = between.low <= 1.0 <= between.high or abs(between.median - 1) <= NOISE
            cells.append(
                Cell(
                    name,
                    job.key.tokens,
                    dict(a.config),
                    dict(b.config),
                    default_us,
                    statistics.median(found.ratios) if found.ratios else 1.0,
                    default_us / least_us(job, rates),
                    1 / against.median,
                    1 / against.high,
                    1 / against.low,
                    against.pairs,
                    agree,
                    between.median,
                    note,
                    found.outcome.tried,
                    found.outcome.failed,
                )
            )
    return cells


def _ratio(measurer: Measurer, config: Any, against: Any, effort: Effort) -> tuple[Ratio, str, float | None]:
    """-> the ratio, a note, median microseconds of `against`. 1, "", None without measuring where both are the same."""
    if config == against:
        return Ratio(1.0, 1.0, 1.0, 0), "", None
    found = measurer.measure(config, against, effort, FRESH_SEED)
    if found.status != "ok":
        raise SystemExit(f"a winner failed on fresh inputs: {found.status}, {found.reason}")
    return found.ratio, found.reason, 1e6 * statistics.median(other for _, other in found.pairs)


def report(cells: list[Cell]) -> Table:
    """A row per cell."""
    table = Table(title="tuned against default", title_justify="left")
    columns = "shape", "T", "gain", "95 % bound", "others", "at most", "pairs", "agree", "tried", "changes", "note"
    for column in columns:
        table.add_column(column)
    for c in cells:
        default = experts_space(problem_of(c.shape), best_level() or "avx2", c.tokens).default
        changes = ", ".join(f"{n}={_short(n, v)}" for n, v in c.config.items() if default[n] != v) or "default"
        colour = "red" if c.is_regression else "green" if c.low > 1 else "dim"
        agree = "yes" if c.agree else f"no, {c.between:.3f}"
        row = (
            c.shape,
            str(c.tokens),
            f"[{colour}]{c.gain:.3f}x[/]",
            f"{c.low:.3f} .. {c.high:.3f}",
            f"{c.others:.2f}x",
            f"{c.at_most:.2f}x",
            str(c.pairs),
            agree,
        )
        table.add_row(*row, str(c.tried), changes, c.note)
    return table


def _short(name: str, value: Any) -> str:
    return f"{value >> 10}K" if name.endswith("_bytes") else str(value)


def verdicts(cells: list[Cell], trace: TraceResult | None) -> list[tuple[bool, str]]:
    """Each target, and whether it is met."""
    found = []
    if cells:
        slower = [f"{c.shape} T={c.tokens}" for c in cells if c.is_regression]
        gain = geometric_mean([c.gain for c in cells])
        most = geometric_mean([c.at_most for c in cells])
        agreement = sum(c.agree for c in cells) / len(cells)
        found += [
            (not slower, f"regressions: {len(slower)} of {len(cells)} {', '.join(slower)}"),
            (gain >= TARGET_GAIN, f"geometric mean gain {gain:.3f}x, target {TARGET_GAIN}x, at most {most:.2f}x"),
            (agreement >= TARGET_AGREEMENT, f"seeds agree in {agreement:.0%} of the cells, target 95 %"),
        ]
    if trace is not None:
        found.append((trace.is_no_slower, trace.text))
    return found


def main(
    shape: Annotated[str, typer.Option(help=f"comma-separated: {', '.join(SHAPES)}; empty: none")] = ",".join(SHAPES),
    tokens: Annotated[str, typer.Option(help="comma-separated token counts")] = "1,4,16,64,512,2048",
    trials: Annotated[int, typer.Option(help="candidates of a cell, at most")] = 24,
    minutes: Annotated[float, typer.Option(help="for all; searches end early to keep it")] = 12.0,
    seeds: Annotated[str, typer.Option(help="of the two runs")] = "0,1",
    exponent: Annotated[float, typer.Option("--zipf", help="of expert use; 0: uniform")] = 0.4,
    cpu_clock: Annotated[bool, typer.Option(help="one thread, by its processor time: for a busy machine")] = False,
    trace: Annotated[bool, typer.Option(help="part two")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="writes all results there")] = None,
) -> None:
    """Prints a table and the verdicts."""
    started, level = time.monotonic(), best_level() or "avx2"
    names, counts = [n for n in shape.split(",") if n], [int(t) for t in tokens.split(",")]
    seed_a, seed_b = (int(s) for s in seeds.split(","))
    shares = sum(SHARE.get(t, 0.6) for t in counts) * 2 * max(1, len(names))
    budget_s = minutes * 60 * SEARCH_SHARE / shares
    settings = Settings(
        trials=trials, budget_s=0.6 * budget_s, screen=dataclasses.replace(SCREEN, budget_s=0.15 * budget_s),
        confirm=dataclasses.replace(CONFIRM, budget_s=0.2 * budget_s), finalists=2, seed=seed_a,
    )  # fmt: skip
    effort = dataclasses.replace(CONFIRM, budget_s=0.25 * budget_s)
    if cpu_clock:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the measuring processes
        torch.set_num_threads(1)
        settings, effort = settings.by_cpu_clock(), dataclasses.replace(effort, cpu_clock=True)
    build_ahead(names, level, counts)
    rates = measure_rates(default_cache_dir())
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            outcomes = []
            for seed in (seed_a, seed_b):
                jobs = jobs_for(problem_of(name), level, zipf(exponent), counts, seed)
                outcomes.append(tuned(jobs, Path(folder), name, dataclasses.replace(settings, seed=seed)))
            cells += compared(name, jobs, *outcomes, effort, rates)
            console.print(report([c for c in cells if c.shape == name]))
        told = trace_against_uniform(Path(folder), settings, effort) if trace else None
    found = verdicts(cells, told)
    for good, text in found:
        console.print(f"[{'green' if good else 'red'}]{text}[/]", soft_wrap=True)
    took = time.monotonic() - started
    console.print(f"[dim]{took / 60:.1f} minutes[/dim]")
    results = {
        "level": level, "torch": torch.__version__, "threads": torch.get_num_threads(), "cpu_clock": cpu_clock,
        "rates": rates, "zipf": exponent, "seconds": took, "cells": cells, "trace": told,
        "verdicts": [{"met": good, "text": text} for good, text in found],
    }  # fmt: skip
    write_json(json_file, results)
    raise typer.Exit(0 if all(good for good, _ in found) else 1)


if __name__ == "__main__":
    typer.run(main)
