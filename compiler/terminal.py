"""What the commands share: options that mean the same everywhere, a progress bar, JSON on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

Model = Annotated[str, typer.Argument(help="directory, zoo:NAME, package.module:factory, FILE.pt2 or FILE.onnx")]
Layers = Annotated[int | None, typer.Option(help="keep only the first N layers")]
RandomWeights = Annotated[int | None, typer.Option(help="seed; for directories without safetensors")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="import the code in the model's directory (auto_map)")]
TrustPt2 = Annotated[bool, typer.Option("--trust-pt2", help="read a .pt2 file, which may run code that is in it")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A callback (stage, done, total) that draws a bar for each stage on standard error, where that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    err = Console(stderr=True)
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report


def whole_numbers(text: str, option: str) -> list[int]:
    """The numbers of "1,4,16". Raises: EngineError: anything else; option: whose value it is, for the message."""
    from moec.runtime.errors import EngineError

    try:
        return [int(piece) for piece in text.split(",") if piece.strip()]
    except ValueError as bad:
        raise EngineError(f"{option}: expected comma-separated integers, got {text!r}") from bad


def print_json(value: Any) -> None:
    """The value as indented JSON; what JSON has no form for as its text."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")
