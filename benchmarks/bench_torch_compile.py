"""Times one MoE layer, router included: eager, torch.compile with inductor, and with backend="moec".

    python benchmarks/bench_torch_compile.py [--shape NAME,..] [--tokens 1,16,64,512] [--experts N] [--json F]

All three run the same module on the same weights (shared, so that Mixtral keeps all of its experts: 8 GB in all), in
turn, each call on fresh tokens; before that each must agree with a float32 reference. A ratio is the median over rounds
of (the other's time over moec's time in the same round). The modules are transformers' own (experts_implementation
"grouped_mm", the default), and one written by hand: experts in a ModuleList, a loop that picks the rows of each by
torch.where. inductor compiles transformers' for each number of tokens (dynamic=False), its fastest form, and the loop,
whose sizes follow from values, as it does on its own; moec compiles once, the loop with fullgraph=True. Exit code 1
when a candidate is wrong or moec is not the fastest.
"""

from __future__ import annotations

import dataclasses
import gc
import time
import types
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from bench_moe_layer import (
    Cell,
    Timing,
    complaints,
    console,
    distinct_experts,
    one_line,
    report,
    time_cell,
    write_cells,
)
from moe_layers import DISTINCT_EXPERTS, SHAPES, Layer, Shape, Weights, random_weights, transformers_module
from torch import Tensor, nn
from torch.nn import functional as F

from moec.compiler.dynamo import backend

HAND_WRITTEN = Shape("hand-written", 2048, 2816, 16, 2, 0, True, "bfloat16")
LAYERS = {
    s.name: s for s in (SHAPES["mixtral-8x7b"], SHAPES["qwen3-30b-a3b"], HAND_WRITTEN, SHAPES["deepseek-moe-16b"])
}
DEFAULT = ("mixtral-8x7b", "qwen3-30b-a3b", "hand-written")
QUICK = {"verify": "off"}
"""No evidence for each pass: every candidate is compared with the reference here, and evidence needs memory."""
WARM_CALLS = 6
"""Before a cell, of the loop: inductor compiles it again while the rows of an expert are of new numbers."""


class Expert(nn.Module):
    """A gated feed-forward layer: [n, H] -> [n, H]."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Parameter(w, requires_grad=False) for w in (gate, up, down))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


class HandWritten(nn.Module):
    """An MoE block as people write it: x [B, S, H] -> [B, S, H]."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.router = nn.Parameter(weights.router, requires_grad=False)
        stacks = zip(weights.gate_up, weights.down, strict=True)
        self.experts = nn.ModuleList(Expert(up[: shape.inner], up[shape.inner :], down) for up, down in stacks)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        weights, chosen = F.linear(flat, self.router).float().softmax(-1).topk(self.top_k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        y = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == e)
            y.index_add_(0, rows, expert(flat[rows]) * weights[rows, place, None])
        return y.view(x.shape)


def build(shape: Shape, weights: Weights) -> dict[str, Layer]:
    """The three candidates. One module each: Dynamo keeps compiled code with a module's class and backend."""
    torch.compiler.reset()
    if shape.name == HAND_WRITTEN.name:
        made = {
            "moec": torch.compile(_hand_written("moec", shape, weights), backend="moec", fullgraph=True, options=QUICK),
            "inductor": torch.compile(_hand_written("inductor", shape, weights)),
            "eager": _hand_written("eager", shape, weights),
        }
    else:
        modules = [transformers_module(shape, weights, "grouped_mm") for _ in range(3)]
        made = {
            "moec": torch.compile(modules[0], backend="moec", options=QUICK),
            "inductor": torch.compile(modules[1], dynamic=False),
            "eager": modules[2],
        }
    return {name: (lambda x, module=module: module(x[None])[0]) for name, module in made.items()}


def _hand_written(candidate: str, shape: Shape, weights: Weights) -> nn.Module:
    """The block with a forward of its own: code that one backend cannot trace Dynamo runs in eager mode for all."""
    plain = HandWritten.forward
    code = plain.__code__.replace(co_name=f"forward_{candidate}")
    forward = types.FunctionType(code, plain.__globals__, code.co_name, plain.__defaults__, plain.__closure__)
    return type(HandWritten.__name__, (HandWritten,), {"forward": forward})(shape, weights).eval()


def run_layer(shape: Shape, counts: list[int], timing: Timing) -> list[Cell]:
    """All cells of a layer, printed as they come and as a table."""
    loop = shape.name == HAND_WRITTEN.name  # lifted by what it computes, which tells equal experts not apart
    weights = random_weights(shape, torch.bfloat16, distinct_experts=shape.experts if loop else DISTINCT_EXPERTS)
    layers, cells = build(shape, weights), list[Cell]()
    for count in counts:
        for _ in range(WARM_CALLS if loop else 0):
            layers["inductor"](torch.randn(count, shape.hidden).to(torch.bfloat16))
        found = time_cell(shape, weights, layers, {}, count, timing)
        console.print(f"[dim]{one_line(found)}[/dim]", soft_wrap=True)
        cells += found
    graphs = [f"{r.experts} layer of experts, symbolic {list(r.dynamic)}" for r in backend.records if not r.reason]
    eager = [r.reason for r in backend.records if r.reason]
    console.print(report(shape, cells, {count: distinct_experts(shape, weights, count) for count in counts}))
    console.print(f"graphs of moec: {graphs}; in eager mode: {eager}", soft_wrap=True)
    torch.compiler.reset()
    return cells


def main(
    shape: Annotated[str, typer.Option(help=f"comma-separated: {', '.join(LAYERS)}")] = ",".join(DEFAULT),
    tokens: Annotated[str, typer.Option(help="comma-separated token counts")] = "1,16,64,512",
    experts: Annotated[int, typer.Option(help="keep at most so many experts of a layer; 0: all")] = 0,
    rounds: Annotated[int, typer.Option(help="rounds per cell, at most")] = 15,
    budget_s: Annotated[float, typer.Option(help="seconds per cell after which no further round starts")] = 8.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="writes all times there")] = None,
) -> None:
    """Prints a table per layer and how often the backend compiled."""
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", category=UserWarning)
    timing = Timing(time.perf_counter, rounds, budget_s, 0.0)
    cells: list[Cell] = []
    for name in shape.split(","):
        layer = LAYERS[name]
        layer = dataclasses.replace(layer, experts=min(layer.experts, experts or layer.experts))
        cells += run_layer(layer, [int(t) for t in tokens.split(",")], timing)
        gc.collect()
        write_cells(json_file, {"torch": torch.__version__, "threads": torch.get_num_threads()}, cells)
    raise typer.Exit(1 if complaints(cells) else 0)


if __name__ == "__main__":
    typer.run(main)
