"""The command `moec trace`: records which experts an engine uses on given tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from moec.compiler.terminal import Json, print_json, progress_bar


def register(app: typer.Typer) -> None:
    """Adds `trace` to an application."""
    app.command(name="trace")(trace)


def trace(
    engine: Annotated[Path, typer.Argument(help="engine folder, of one rank")],
    tokens_file: Annotated[Path, typer.Option(help="token ids, a sequence a line: 17,4,256 or [17, 4, 256]")],
    output: Annotated[Path, typer.Option("-o", "--output", help="file to write (.json)")],
    batch: Annotated[int, typer.Option(min=1, help="sequences at a time")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="tokens to generate after each; 0: none")] = 0,
    as_json: Json = False,
) -> None:
    """Record the routing of ENGINE on a file of tokens, for moec tune --trace and moec plan --trace."""
    import moec
    from moec.runtime.recording import read_tokens, record_routing, run_sequences
    from moec.runtime.routing import write_routing

    sequences = read_tokens(tokens_file)
    loaded = moec.load(engine)
    with record_routing(loaded) as recorder, progress_bar(as_json) as report:
        run_sequences(loaded, sequences, batch, max_new_tokens, report)
    routing = recorder.routing(loaded.manifest["model"]["model_type"])
    write_routing(routing, output)
    rows = [r.summary() for r in routing.layers]
    if as_json:
        print_json({"routing": routing.name, "num_tokens": routing.num_tokens, "layers": rows})
        return
    out, table = Console(), Table(title=f"{routing.name}, {routing.num_tokens} tokens", title_justify="left")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    out.print(table)
    out.print(f"routing: {output}", soft_wrap=True)
