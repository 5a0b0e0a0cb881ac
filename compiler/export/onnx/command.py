"""The command `moec export-onnx`; register(app) adds it to the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moec.compiler.terminal import Layers, Model, RandomWeights, Trust, TrustPt2, print_json, progress_bar

WEIGHTS_HELP = (
    "f32; bf16 or f16: stored so, computed in float32; int4, int8: the experts as codes (QMoE with com.microsoft); "
    "model=bf16,experts=int4"
)


def register(app: typer.Typer) -> None:
    """Adds `export-onnx` to a typer application."""
    app.command(name="export-onnx")(export_onnx_command)


def export_onnx_command(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="file to write; must not exist")],
    experts: Annotated[
        str, typer.Option(help="portable: runs in any runtime; com.microsoft: ONNX Runtime's own MoE")
    ] = "portable",
    opset: Annotated[int, typer.Option(help="of ai.onnx: 21 to 25")] = 21,
    weights: Annotated[str | None, typer.Option(help=WEIGHTS_HELP)] = None,
    layers: Layers = None,
    random_weights: RandomWeights = None,
    trust_remote_code: Trust = False,
    trust_pt2: TrustPt2 = False,
    as_json: Annotated[bool, typer.Option("--json", help="print what was checked as JSON")] = False,
) -> None:
    """Write MODEL as ONNX: one node for the experts of a layer, checked against the model in ONNX Runtime."""
    from moec.compiler.export.onnx.api import export_onnx

    with progress_bar(as_json) as report:
        made = export_onnx(
            model,
            output,
            experts=experts,
            opset=opset,
            weights=weights,
            layers=layers,
            random_weights=random_weights,
            trust_remote_code=trust_remote_code,
            trust_pt2=trust_pt2,
            progress=report,
        )
    if as_json:
        print_json({"path": str(made.path), **made.record})
        return
    out = Console()
    checked, covered = made.record["verified"], made.record["coverage"]
    count = sum(c["experts"] for c in covered)
    stored = ", ".join(dict.fromkeys(c["stored"] for c in covered))
    found = f"experts: {count} in {len(covered)} layers, all in the file as {stored}"
    out.print(found if count else "no layer with experts was found", soft_wrap=True)
    out.print(
        f"ONNX Runtime {checked['onnxruntime']} on {checked['provider']}: largest relative error "
        f"{checked['max_rel_err']:.1e} (allowed {checked['tolerance']:.0e})",
        soft_wrap=True,
    )
    if "rounding" in made.record:
        change = made.record["rounding"]
        out.print(f"{change['weights']} changes the outputs by {change['max_rel_change']:.1e}", soft_wrap=True)
    out.print(f"{made.nodes} nodes; written: {made.path}", soft_wrap=True)
