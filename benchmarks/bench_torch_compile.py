"""Times one MoE layer of transformers, router included: eager, torch.compile with inductor, and with backend="moec".

    python benchmarks/bench_torch_compile.py [--shape NAME,..] [--tokens 1,16,64,512] [--experts N] [--json F]

All three run the same module (experts_implementation "grouped_mm", the default; eager is it uncompiled) on the
same weights, in turn, each call on fresh tokens; before that each must agree with a float32 reference. A ratio is the
median over rounds of (the other's time over moec's time in the same round). inductor compiles for each number of tokens
(dynamic=False), moec once. Mixtral has 4 of its 8 experts here, so that weights and packed copy fit into 6 GiB. Exit
code 1 when a candidate is wrong or moec is not faster than inductor.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from bench_moe_layer import TOLERANCE, Cell, Timing, console, one_line, time_cell
from moe_layers import SHAPES, Layer, Shape, Weights, random_weights, transformers_module

from moec.compiler.dynamo import backend

LAYERS = {
    "mixtral-8x7b": dataclasses.replace(SHAPES["mixtral-8x7b"], experts=4),
    "qwen3-30b-a3b": SHAPES["qwen3-30b-a3b"],
    "deepseek-moe-16b": SHAPES["deepseek-moe-16b"],
}


def build(shape: Shape, weights: Weights) -> dict[str, Layer]:
    """The three candidates. One module each: Dynamo keeps compiled code with a module's class and backend."""
    torch.compiler.reset()
    modules = [transformers_module(shape, weights, "grouped_mm") for _ in range(3)]
    made = {
        "moec": torch.compile(modules[0], backend="moec"),
        "inductor": torch.compile(modules[1], dynamic=False),
        "eager": modules[2],
    }
    return {name: (lambda x, module=module: module(x[None])[0]) for name, module in made.items()}


def main(
    shape: Annotated[str, typer.Option(help=f"comma-separated: {', '.join(LAYERS)}")] = ",".join(LAYERS),
    tokens: Annotated[str, typer.Option(help="comma-separated token counts")] = "1,16,64,512",
    experts: Annotated[int, typer.Option(help="keep at most so many experts of a layer; 0: all of LAYERS")] = 0,
    rounds: Annotated[int, typer.Option(help="rounds per cell, at most")] = 15,
    budget_s: Annotated[float, typer.Option(help="seconds per cell after which no further round starts")] = 10.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="writes all times there")] = None,
) -> None:
    """Prints a line per cell and how often the backend compiled."""
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", category=UserWarning)
    timing = Timing(time.perf_counter, rounds, budget_s, 0.0)
    cells: list[Cell] = []
    for name in shape.split(","):
        layer = LAYERS[name]
        layer = dataclasses.replace(layer, experts=min(layer.experts, experts or layer.experts))
        weights = random_weights(layer, torch.bfloat16)
        layers = build(layer, weights)
        for count in map(int, tokens.split(",")):
            found = time_cell(layer, weights, layers, {}, count, timing)
            console.print(one_line(found), soft_wrap=True)
            cells += found
        graphs = [f"{r.experts} layer of experts, symbolic {list(r.dynamic)}" for r in backend.records if not r.reason]
        eager = [r.reason for r in backend.records if r.reason]
        console.print(f"{name}: E {layer.experts}; compiled graphs: {graphs}; in eager mode: {eager}", soft_wrap=True)
        del weights, layers
        torch.compiler.reset()
        gc.collect()
    if json_file:
        payload = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        json_file.write_text(json.dumps({**payload, "cells": [dataclasses.asdict(c) for c in cells]}, indent=1))
    wrong = [c for c in cells if c.error is not None and not c.error < TOLERANCE[torch.bfloat16]]
    slower = [c for c in cells if c.candidate == "inductor" and c.ratio is not None and c.ratio <= 1]
    for cell in wrong + slower:
        what = f"error {cell.error:.3f}" if cell in wrong else f"inductor is as fast: ratio {cell.ratio:.2f}"
        console.print(f"[red]{cell.shape} T={cell.tokens} {cell.candidate}: {what}[/red]")
    raise typer.Exit(1 if wrong or slower else 0)


if __name__ == "__main__":
    typer.run(main)
