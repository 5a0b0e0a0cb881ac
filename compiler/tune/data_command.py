"""`moec tune ls|show|diff|merge|export|import`: look at, compare and carry tuning results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moec.compiler.terminal import Json, print_json
from moec.compiler.tune.group import tune_app

if TYPE_CHECKING:
    from moec.compiler.tune.compare import Summary
    from moec.compiler.tune.record import Record

_out = Console()
SHOWN_CANDIDATES = 5

Db = Annotated[Path, typer.Option("--db", help="tuning database")]
OnlyOp = Annotated[str | None, typer.Option("--op", help="only this operation")]
OnlyDevice = Annotated[str | None, typer.Option("--device", help="only this device")]
OnlyTokens = Annotated[int | None, typer.Option("--tokens", help="only this number of tokens")]


def register(app: typer.Typer) -> None:
    """Adds the group `tune` to an application, these commands in it."""
    commands: dict[str, Callable[..., None]] = {
        "ls": ls,
        "show": show,
        "diff": diff,
        "merge": merge,
        "export": export,
        "import": import_,
    }
    for name, function in commands.items():
        tune_app.command(name=name)(function)
    app.add_typer(tune_app, name="tune")


def _filters(op: str | None, device: str | None, tokens: int | None) -> dict[str, Any]:
    given = {"op": op, "device": device, "tokens": tokens}
    return {name: value for name, value in given.items() if value is not None}


def ls(db: Db, op: OnlyOp = None, device: OnlyDevice = None, tokens: OnlyTokens = None, as_json: Json = False) -> None:
    """List the problems of a database: how many trials, the winner, its gain over the default."""
    from moec.compiler.tune.compare import summaries
    from moec.compiler.tune.database import Database

    with Database(db, read_only=True) as database:
        found = summaries(database.records(**_filters(op, device, tokens)))
    if as_json:
        print_json([s.to_json() for s in found])
        return
    table = Table()
    for column in ("op", "shape", "tokens", "weights", "routing", "device", "trials", "speed-up", "winner"):
        number = column in ("tokens", "trials", "speed-up")
        table.add_column(column, justify="right" if number else "left", no_wrap=number)
    for s in found:
        k = s.key
        row = (k.op, k.shape, str(k.tokens), k.weight_format, k.routing, k.device, str(s.trials))
        table.add_row(*row, _speedup_text(s.winner), _changes(s.winner, s.default))
    _out.print(table)


def _speedup_text(winner: Record | None) -> str:
    if winner is None or winner.is_default or winner.ratio is None:
        return "default"
    bound = f" ({1 / winner.ratio_high:.2f} at least)" if winner.ratio_high else ""
    return f"{1 / winner.ratio:.2f}x{bound}"


def _changes(used: Record | None, default: Record | None) -> str:
    """What a winner sets otherwise than the default, in words."""
    from moec.compiler.tune.words import changes

    if used is None or used is default:
        return ""
    return changes(used, default) or "as the default"


def show(
    db: Db,
    op: OnlyOp = None,
    device: OnlyDevice = None,
    tokens: OnlyTokens = None,
    html: Annotated[Path | None, typer.Option(help="write one self-contained page here")] = None,
    as_json: Json = False,
) -> None:
    """Show what was found out: the fastest candidates of each problem, what was rejected and why."""
    from moec.compiler.tune.compare import by_key, summaries
    from moec.compiler.tune.database import Database
    from moec.compiler.tune.record import record_to_json

    with Database(db, read_only=True) as database:
        records = database.records(**_filters(op, device, tokens))
    if html is not None:
        from moec.compiler.tune.page import write_page

        write_page(records, html)
    if as_json:
        groups = by_key(records)
        print_json([s.to_json() | {"records": [record_to_json(r) for r in groups[s.key]]} for s in summaries(records)])
        return
    for summary in summaries(records):
        _out.print(_problem_table(summary, [r for r in records if r.key == summary.key]))
    if html is not None:
        _out.print(f"page: {html}", soft_wrap=True)


def _problem_table(summary: Summary, records: Sequence[Record]) -> Table:
    from moec.compiler.tune.compare import rejections

    key = summary.key
    title = f"{key.op} {key.shape}, {key.tokens} tokens, {key.weight_format}, {key.routing}, {key.device}"
    table = Table(title=title, title_justify="left")
    for column in ("", "us", "over default", "configuration or reason"):
        table.add_column(column, justify="right" if column in ("us", "over default") else "left")
    good = sorted((r for r in records if r.status == "ok" and r.is_measured), key=lambda r: r.ratio or 1.0)
    for record in good[:SHOWN_CANDIDATES]:
        mark = "winner" if record.is_winner else "default" if record.is_default else ""
        ratio = "" if record.ratio is None else f"{record.ratio:.3f}"
        table.add_row(mark, f"{record.median_us:.1f}", ratio, _changes(record, summary.default))
    for status, reasons in rejections(records).items():
        for reason, count in reasons:
            table.add_row(status, "", str(count), reason)
    return table


def diff(
    left: Annotated[Path, typer.Argument(help="tuning database")],
    right: Annotated[Path, typer.Argument(help="another one")],
    as_json: Json = False,
) -> None:
    """Compare the winners of two databases."""
    from moec.compiler.tune.compare import differences
    from moec.compiler.tune.database import Database

    with Database(left, read_only=True) as a, Database(right, read_only=True) as b:
        found, agree = differences(a.records(), b.records())
    if as_json:
        print_json({"agree": agree, "differences": [d.to_json() for d in found]})
        return
    table = Table()
    for column in ("op", "shape", "tokens", "device", "", "left", "right", "within noise"):
        table.add_column(column)
    for d in found:
        sides = ["" if r is None else _changes(r, None) for r in (d.left, d.right)]
        noise = {True: "yes", False: "no", None: "unknown" if d.kind == "config" else ""}[d.within_noise]
        table.add_row(d.key.op, d.key.shape, str(d.key.tokens), d.key.device, d.kind, *sides, noise)
    _out.print(table)
    _out.print(f"{agree} problems have the same winner, {len(found)} differ")


def merge(
    into: Annotated[Path, typer.Argument(help="tuning database that gets the records; made where there is none")],
    sources: Annotated[list[Path], typer.Argument(help="tuning databases to take them from")],
    as_json: Json = False,
) -> None:
    """Add the records of other databases; where winners differ the surer one stays."""
    from moec.compiler.tune.compare import merge as merge_records
    from moec.compiler.tune.database import Database

    told = []
    with Database(into) as target:
        for source in sources:
            with Database(source, read_only=True) as database:
                merged = merge_records(target, database.records())
            told.append({"source": str(source), "added": merged.added, "conflicts": len(merged.conflicts)})
    _tell(told, as_json)


def _tell(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    for row in rows:
        _out.print(
            f"{row['source']}: {row['added']} new records, {row['conflicts']} problems with two winners", soft_wrap=True
        )


def export(
    db: Db,
    output: Annotated[Path, typer.Option("-o", "--output", help="file; for vllm a folder")],
    format: Annotated[str, typer.Option(help="jsonl: every record; vllm: fused_moe configurations")] = "jsonl",
    op: OnlyOp = None,
    device: OnlyDevice = None,
    tokens: OnlyTokens = None,
    as_json: Json = False,
) -> None:
    """Write results to a file that can be shared."""
    from moec.compiler.tune.database import Database
    from moec.compiler.tune.exchange import write_lines
    from moec.compiler.tune.vllm import export_tables

    with Database(db, read_only=True) as database:
        records = database.records(**_filters(op, device, tokens))
    if format == "vllm":
        exported = export_tables(records, output)
        told: dict[str, Any] = {"files": [str(f) for f in exported.files], "left_out": list(exported.left_out)}
    else:
        _check_format(format)
        write_lines(records, output)
        told = {"files": [str(output)], "left_out": []}
    if as_json:
        print_json(told)
        return
    for file in told["files"]:
        _out.print(file, soft_wrap=True, highlight=False)
    for reason in told["left_out"]:
        _out.print(f"left out: {reason}", soft_wrap=True, highlight=False)


def _check_format(format: str) -> None:
    from moec.compiler.tune.errors import TuneError

    if format != "jsonl":
        raise TuneError(f"--format {format!r}; known: jsonl, vllm")


def import_(
    files: Annotated[
        list[Path], typer.Argument(help="results of export or of a bundle's run.py; E=..,N=...json of vLLM")
    ],
    db: Db,
    shape: Annotated[
        str | None, typer.Option(help="for vLLM's files, which do not say it: H=4096,K=2 (hidden size, top-k)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Add results from files: exported records, a bundle's results, or vLLM's tuned configurations."""
    from moec.compiler.tune.bundle_results import read_any
    from moec.compiler.tune.compare import merge as merge_records
    from moec.compiler.tune.database import Database
    from moec.compiler.tune.vllm import is_table, read_table

    told = []
    with Database(db) as target:
        for file in files:
            records = read_table(file, shape) if is_table(file) else read_any(file)
            merged = merge_records(target, records)
            told.append({"source": str(file), "added": merged.added, "conflicts": len(merged.conflicts)})
    _tell(told, as_json)
