"""`moec tune`: a group of commands whose default is the tuning run, so that `moec tune MODEL` and `moec tune ls` work.

The run is the command that `app.command(name=RUN)` registers; `moec tune run ls` tunes a model that is called ls.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

RUN = "run"


class DefaultRun(TyperGroup):
    """Takes `tune X ..` for `tune run X ..` wherever X is no command of the group and no request for help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts `run` before arguments that name no command."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [RUN, *args]
        return super().parse_args(ctx, args)


tune_app = typer.Typer(
    cls=DefaultRun,
    name="tune",
    no_args_is_help=True,
    help="Tune the kernels of MODEL (`moec tune MODEL ..`), or look at, compare and carry the results.",
)
