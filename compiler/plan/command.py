"""The command `moec plan`; register(app) adds it to the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moec.compiler.terminal import Trust, print_json, progress_bar


def register(app: typer.Typer) -> None:
    """Adds `plan` to a typer application."""
    app.command(name="plan")(plan_command)


def plan_command(
    model: Annotated[str, typer.Argument(help="zoo:NAME, or a directory with config.json")],
    mesh: Annotated[str, typer.Option(help="rtx4090x8, a100x8, h100x8, h200x8, h100x8x2 .. or a mesh file (.json)")],
    weights: Annotated[str, typer.Option(help="bf16, fp16, fp8, int8, int4, int2, ternary or mxfp4")] = "bf16",
    batch: Annotated[int, typer.Option(help="sequences in flight; 0: the best sustained throughput")] = 0,
    prompt_len: Annotated[int, typer.Option(help="prompt tokens of a request")] = 128,
    gen_len: Annotated[int, typer.Option(help="output tokens of a request")] = 128,
    num_requests: Annotated[int, typer.Option(help="requests in the queue; 0: it never empties")] = 0,
    strategy: Annotated[
        str | None, typer.Option(help="only this one: TP8, TP4xPP2, EP8, DP8-EP8, EP8+1, TP2xR4 ..")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="recorded routing (.json); default: Zipf")] = None,
    zipf: Annotated[float, typer.Option(help="exponent of the expert use assumed without a trace")] = 0.4,
    capacity: Annotated[float | None, typer.Option(help="predict the drops of this capacity factor")] = None,
    kv: Annotated[
        str, typer.Option(help="cache: bf16, fp8, or auto (fp8 for fp8 weights with --num-requests)")
    ] = "auto",
    trust_remote_code: Trust = False,
    times: Annotated[Path | None, typer.Option(help="measured kernel times by device (.json)")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="write plan.json here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print plan.json")] = False,
    html: Annotated[Path | None, typer.Option(help="write one self-contained page here")] = None,
) -> None:
    """Spread MODEL over a mesh: who holds what, how fast it will be, and a certificate that little is left to gain."""
    from moec.compiler.plan.api import plan
    from moec.compiler.plan.inputs import PlanError, read_times
    from moec.compiler.plan.page import plan_page
    from moec.compiler.plan.report import cannot_fit, print_plan

    with progress_bar(as_json) as report:
        made = plan(
            model,
            mesh,
            weights,
            batch=batch,
            prompt_len=prompt_len,
            gen_len=gen_len,
            num_requests=num_requests,
            strategy=strategy,
            trace=trace,
            zipf=zipf,
            capacity=capacity,
            kv=kv,
            times=None if times is None else read_times(times),
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    if output is not None:
        made.save(output)
    if as_json:
        print_json(made.document)
    if not made.feasible:
        raise PlanError(cannot_fit(made.document))
    if html is not None:
        html.write_text(plan_page(made.document))
    if not as_json:
        print_plan(made.document, made.verify(), Console())
