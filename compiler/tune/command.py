"""The command `moec tune MODEL ..`: a tuning run with a live table; register() adds it to the group `tune`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moec.compiler.terminal import Json, Layers, RandomWeights, Trust, print_json, whole_numbers
from moec.compiler.tune.group import RUN, tune_app
from moec.compiler.tune.words import short_shape

if TYPE_CHECKING:
    from moec.compiler.tune.record import Key, Record
    from moec.compiler.tune.search import Event, Outcome


def register() -> None:
    """Adds the run to the group."""
    tune_app.command(name=RUN)(run)


def run(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, zoo:NAME or package.module:factory")],
    db: Annotated[Path, typer.Option("--db", help="tuning database, made where there is none")],
    target: Annotated[
        str, typer.Option(help="cpu, or one CPU level: cpu:amx ..; with --bundle cuda:sm_90a ..")
    ] = "cpu",
    weights: Annotated[str | None, typer.Option(help="as for compile: times depend on the format")] = None,
    trials: Annotated[int, typer.Option(min=1, help="candidates for each layer and token count")] = 32,
    trace: Annotated[Path | None, typer.Option(help="recorded routing (moec trace); default: Zipf")] = None,
    zipf: Annotated[float, typer.Option(min=0.0, help="exponent of expert use without a trace; 0: uniform")] = 0.4,
    tokens: Annotated[str, typer.Option(help="comma-separated token counts")] = "1,4,16,64,512,2048",
    resume: Annotated[bool, typer.Option("--resume", help="continue with what the database holds")] = False,
    seed: Annotated[int, typer.Option(help="of proposals and inputs")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="measuring processes; they take turns at timing")] = 1,
    budget_s: Annotated[float, typer.Option(min=0.0, help="seconds for each layer and token count; 0: no end")] = 0.0,
    cpu_clock: Annotated[
        bool, typer.Option("--cpu-clock", help="one thread's processor time: for a machine that others use")
    ] = False,
    layers: Layers = None,
    random_weights: RandomWeights = None,
    trust_remote_code: Trust = False,
    devices: Annotated[int | None, typer.Option(help="tune a rank's slices of the layers, as for compile")] = None,
    strategy: Annotated[str | None, typer.Option(help="with --devices, as for compile")] = None,
    bundle: Annotated[Path | None, typer.Option(help="build candidates for a GPU elsewhere in this folder")] = None,
    results: Annotated[Path | None, typer.Option("--import", help="take the results of a bundle's run.py")] = None,
    as_json: Json = False,
) -> None:
    """Tune the expert kernels of MODEL on this machine; `moec compile --tune-db` uses what is found."""
    import moec
    from moec.compiler.tune.errors import TuneError

    if strategy is not None and devices is None:
        raise TuneError("--strategy says how layers are cut over ranks: give --devices as well")
    if devices is not None and (bundle is not None or results is not None):
        raise TuneError("--devices tunes slices on this machine; bundles hold whole layers: leave one of them out")
    counts = whole_numbers(tokens, "--tokens")
    if bundle is not None or results is not None:
        from moec.compiler.tune.bundle_command import Elsewhere, tune_elsewhere

        asked = Elsewhere(
            model, db, target, bundle, results, trace=trace, zipf=zipf, tokens=tuple(counts), trials=trials,
            seed=seed, trust_remote_code=trust_remote_code, as_json=as_json,
        )  # fmt: skip
        tune_elsewhere(asked)
        return
    err = Console(stderr=True)
    table = _LiveTable(trials)
    shown = err.is_terminal and not as_json
    with Live(table, console=err, refresh_per_second=4, transient=True) if shown else nullcontext():
        outcomes = moec.tune(
            model, target, db=db, trials=trials, trace=trace, zipf_exponent=zipf, tokens=counts,
            weights=weights, layers=layers, random_weights=random_weights, trust_remote_code=trust_remote_code,
            ranks=None if devices is None else moec.RankOptions(devices=devices, strategy=strategy),
            resume=resume, seed=seed, workers=workers, budget_s=budget_s, cpu_clock=cpu_clock, show=table.show,
        )  # fmt: skip
    if as_json:
        print_json([_to_json(o) for o in outcomes])
    else:
        _print_outcomes(outcomes, db)


def _print_outcomes(outcomes: list[Outcome], db: Path) -> None:
    out = Console()
    out.print(_result_table(outcomes))
    gained = sum(not o.winner.is_default for o in outcomes)
    out.print(f"{gained} of {len(outcomes)} are faster than the default; database: {db}", soft_wrap=True)


class _LiveTable:
    """What a run looks like while it goes on: a row per problem, the candidate at hand, and a bar."""

    def __init__(self, trials: int) -> None:
        self._trials = trials
        self._rows: dict[Key, Event] = {}
        self._failed: dict[Key, int] = {}
        self._last = ""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns)
        self._task = self._bar.add_task("candidates", total=trials + 1)

    def show(self, event: Event) -> None:
        """Takes an event of the search."""
        self._rows[event.key] = event
        if event.record is not None and event.kind != "end":
            self._last = f"T={event.key.tokens} {changes_text(event.record)}: {state_text(event.record)}"
            if event.kind == "measured" and event.record.status != "ok":
                self._failed[event.key] = self._failed.get(event.key, 0) + 1
        self._bar.update(self._task, completed=event.done, total=max(event.total, event.done, 1))

    def __rich__(self) -> Group:
        table = Table("layer", "T", "tried", "failed", "best so far", "state")
        for key, event in list(self._rows.items())[-18:]:
            best = f"{1 / event.best:.2f}x" if event.best < 1 else "default"
            state = "done" if event.kind == "end" else "confirming" if event.kind == "confirmed" else "searching"
            tried = str(max(0, event.done - 1))
            table.add_row(short_shape(key), str(key.tokens), tried, str(self._failed.get(key, 0)), best, state)
        return Group(table, self._last, self._bar)


def changes_text(record: Record) -> str:
    """A configuration in short; what is a size in bytes in KiB."""
    if record.is_default:
        return "default"
    parts = []
    for name, value in record.config.items():
        text = f"{value >> 10}K" if name.endswith("_bytes") and isinstance(value, int) else str(value)
        parts.append(f"{name}={text}")
    return ",".join(parts)


def state_text(record: Record) -> str:
    """Its ratio as a speed-up, or why it has none."""
    return f"{1 / record.ratio:.3f}x" if record.ratio else f"{record.status}: {record.reason[:80]}"


def _result_table(outcomes: list[Outcome]) -> Table:
    table = Table(title="winners", title_justify="left")
    for column in ("layer", "T", "tried", "failed", "median us", "speed-up", "at least", "configuration"):
        table.add_column(column, justify="right" if column in ("T", "tried", "failed", "median us") else "left")
    for o in outcomes:
        w = o.winner
        speed, least = (f"{1 / r:.3f}x" if r and not w.is_default else "1" for r in (w.ratio, w.ratio_high))
        median = f"{w.median_us:.0f}" if w.median_us else ""
        row = (short_shape(o.key), str(o.key.tokens), str(o.tried), str(o.failed), median, speed, least)
        table.add_row(*row, changes_text(w))
    return table


def _to_json(outcome: Outcome) -> dict[str, Any]:
    from moec.compiler.tune.record import record_to_json

    return {
        "winner": record_to_json(outcome.winner), "tried": outcome.tried, "failed": outcome.failed,
        "known": outcome.known,
    }  # fmt: skip
