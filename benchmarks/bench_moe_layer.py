"""Times one MoE layer, router included: moec against transformers eager, batched_mm, grouped_mm and torch.compile.

    python benchmarks/bench_moe_layer.py [--shape NAME,..] [--tokens 1,4,..] [--against NAME,..] [--rounds N] [--json F]
    python benchmarks/bench_moe_layer.py --peers [--formats bf16,int8,int4,..]     after `make peers`

All candidates of a cell run in turn, round after round, each call on fresh tokens, so they share whatever the machine
does meanwhile; before that each must agree with a float32 reference. A ratio is the median over rounds of (peer's time
over moec's time in the same round): above 1 moec is faster. Exit code 1 when a candidate is wrong or moec is slower.
With --peers the peers are SGLang's, vLLM's and oneDNN's kernels and transformers' grouped_mm, by format, beside a plain
streaming read of moec's own packed weights; see moe_groups.py.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from moe_groups import GROUPS, build_group, print_peers
from moe_layers import (
    SHAPES,
    Layer,
    Shape,
    StreamingRead,
    Weights,
    decided_rows,
    moec_layer,
    random_weights,
    reference,
    route,
    transformers_layer,
)
from results_file import write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor

PEERS = ("eager", "batched_mm", "grouped_mm", "compile(grouped_mm)", "compile(batched_mm)")
CHECKED_TOKENS = 64
# bf16: the peers round every expert's output and h to bf16, 2**-9 each; f32: sums in another order
TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-4}
console = Console()


@dataclasses.dataclass
class Cell:
    """One candidate at one shape and token count. times_ms: one per round; note: why there are none."""

    shape: str
    dtype: str
    tokens: int
    candidate: str
    times_ms: list[float] = dataclasses.field(default_factory=list)
    error: float | None = None
    note: str = ""
    ratio: float | None = None

    @property
    def median_ms(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.times_ms)


def parse_shape(name: str) -> Shape:
    """A shape of the list, or "H,F,E,K[,shared width]" with x between the numbers: 2880x2880x32x4."""
    if name in SHAPES:
        return SHAPES[name]
    try:
        hidden, inner, experts, top_k, *shared = map(int, name.split("x"))
    except ValueError:
        raise typer.BadParameter(f"{name}: expected one of {', '.join(SHAPES)}, or HxFxExK[xSHARED]") from None
    return Shape(name, hidden, inner, experts, top_k, shared[0] if shared else 0, True, "bfloat16")


def unable(shape: Shape, dtype: torch.dtype, tokens: int, peer: str, gather_limit_bytes: float) -> str:
    """Why a peer is not run, or an empty text."""
    gathered = tokens * shape.top_k * 3 * shape.hidden * shape.inner * dtype.itemsize
    if "batched_mm" in peer and gathered > gather_limit_bytes:
        return f"would gather {gathered / 1e9:.1f} GB of weights"
    return ""


def build_peer(shape: Shape, weights: Weights, peer: str) -> Layer:
    """A transformers candidate by its name in PEERS."""
    compiled = peer.startswith("compile(")
    return transformers_layer(shape, weights, peer.removeprefix("compile(").rstrip(")"), compiled)


def relative_error(layer: Layer, x: Tensor, rows: Tensor, expected: Tensor) -> float:
    """Distance from the reference on some rows, relative to its size."""
    return float((layer(x)[rows].float() - expected).norm() / expected.norm())


def is_wrong(cell: Cell) -> bool:
    """Whether a candidate's results are too far from the reference; NaN is."""
    return cell.error is not None and not cell.error < TOLERANCE[getattr(torch, cell.dtype)]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """How moec's kernels are built. level: of the instruction set."""

    level: str
    cache_dir: Path


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long and by which clock a cell is timed. clock: seconds; limits: of rounds, seconds, gathered bytes."""

    clock: Callable[[], float]
    rounds: int
    budget_s: float
    gather_limit_bytes: float


def time_rounds(
    layers: dict[str, Layer], cells: dict[str, Cell], shape: Shape, tokens: int, dtype: torch.dtype, timing: Timing
) -> None:
    """Every layer once per round, each call on tokens of its own; the order is drawn anew for each round.

    With the same tokens for all, the peers, who share their weights, would find in the cache what the one before read;
    with an order that only rotates each would always follow the same other, and begin with what that left in the cache.
    """
    g = torch.Generator().manual_seed(1000 + tokens)
    names, start = list(layers), time.perf_counter()
    for number in range(timing.rounds):
        for name in (names[i] for i in torch.randperm(len(names), generator=g).tolist()):
            x = torch.randn(tokens, shape.hidden, generator=g).to(dtype)
            layer = layers[name]
            if isinstance(layer, StreamingRead):
                layer.choose(x)
            before = timing.clock()
            layer(x)
            cells[name].times_ms.append((timing.clock() - before) * 1e3)
        if number >= 2 and time.perf_counter() - start > timing.budget_s:
            break


def run_cell(shape: Shape, weights: Weights, moec: Layer, peers: list[str], tokens: int, timing: Timing) -> list[Cell]:
    """Checks and times all candidates at one token count."""
    dtype = weights.router.dtype
    notes, layers = {}, {"moec": moec}
    for peer in peers:
        if note := unable(shape, dtype, tokens, peer, timing.gather_limit_bytes):
            notes[peer] = note
        else:
            layers[peer] = build_peer(shape, weights, peer)
    return time_cell(shape, weights, layers, notes, tokens, timing)


def time_cell(
    shape: Shape, weights: Weights, layers: dict[str, Layer], notes: dict[str, str], tokens: int, timing: Timing
) -> list[Cell]:
    """Checks and times built candidates, moec's among them; notes: why others are absent."""
    dtype = weights.router.dtype
    cells = {n: Cell(shape.name, str(dtype).removeprefix("torch."), tokens, n) for n in (*layers, *notes)}
    for name, note in notes.items():
        cells[name].note = note
    g = torch.Generator().manual_seed(tokens)
    rows = torch.empty(0)
    while not len(rows):
        x = torch.randn(tokens, shape.hidden, generator=g).to(dtype)
        rows = decided_rows(shape, weights, x)[:: -(-tokens // CHECKED_TOKENS)]
    expected = reference(shape, weights, x[rows])
    for name, layer in layers.items():
        if isinstance(layer, StreamingRead):
            layer.choose(x)
        else:
            cells[name].error = relative_error(layer, x, rows, expected)
        layer(x)  # the first call of a size may still compile or allocate
    if layers:
        time_rounds(layers, cells, shape, tokens, dtype, timing)
    for name in layers if "moec" in layers else ():
        pairs = zip(cells[name].times_ms, cells["moec"].times_ms, strict=True)
        cells[name].ratio = statistics.median(a / b for a, b in pairs)
    return list(cells.values())


def one_line(cells: list[Cell]) -> str:
    """A finished cell, so that a run that is cut off has said what it knows."""
    parts = [f"{c.candidate} {c.median_ms:.2f} ms ({c.ratio:.2f}x)" for c in cells if c.times_ms and c.ratio]
    return f"{cells[0].shape} T={cells[0].tokens}: {', '.join(parts)}"


def report(shape: Shape, results: list[Cell], experts: dict[int, float]) -> Table:
    """Rows: candidates; columns: token counts; medians and the ratios to moec."""
    counts = list(dict.fromkeys(c.tokens for c in results))
    title = f"{shape.name}, {results[0].dtype}: H {shape.hidden}, E {shape.experts}, K {shape.top_k}, F {shape.inner}"
    table = Table(
        "candidate", *(f"T={t}" for t in counts), title=f"{title}, shared {shape.shared}  (ms; x: peer / moec)"
    )
    for name in dict.fromkeys(c.candidate for c in results):
        row = []
        for cell in (c for c in results if c.candidate == name):
            if not cell.times_ms:
                row.append(f"[dim]{cell.note}[/dim]")
            elif is_wrong(cell):
                row.append(f"[red]wrong: error {cell.error:.3f}[/red]")
            elif name == "moec":
                row.append(f"[bold]{cell.median_ms:.2f}[/bold]{rates(shape, cell, experts[cell.tokens])}")
            else:
                colour = "green" if (cell.ratio or 0) > 1 else "red"
                row.append(f"{cell.median_ms:.2f} [{colour}]{cell.ratio:.2f}x[/{colour}]")
        table.add_row(name, *row)
    return table


def rates(shape: Shape, cell: Cell, num_experts: float) -> str:
    """What moec's median means for memory and arithmetic."""
    seconds = cell.median_ms / 1e3
    num_bytes = shape.distinct_bytes(num_experts, getattr(torch, cell.dtype).itemsize)
    return f"\n[dim]{num_bytes / seconds / 1e9:.1f} GB/s {shape.num_flops(cell.tokens) / seconds / 1e12:.2f} TF/s[/dim]"


def run_peers(
    shapes: list[Shape], counts: list[int], formats: list[str], timing: Timing, kernels: Kernels
) -> list[Cell]:
    """All cells of --peers, printed shape by shape; a group's weights are dropped before the next is built."""
    everything: list[Cell] = []
    for shape in shapes:
        weights = random_weights(shape, torch.bfloat16)
        for name in formats:
            layers, notes = build_group(name, shape, weights, kernels.level, kernels.cache_dir)
            for count in counts:
                cells = time_cell(shape, weights, layers, notes, count, timing)
                for cell in cells:
                    cell.dtype = name
                everything += cells
                if "moec" in layers:
                    console.print(f"[dim]{name}: {one_line(cells)}[/dim]", soft_wrap=True)
            del layers
            gc.collect()
        print_peers(console, shape, [c for c in everything if c.shape == shape.name])
        del weights
        gc.collect()
    return everything


def distinct_experts(shape: Shape, weights: Weights, tokens: int) -> float:
    """How many experts so many random tokens reach."""
    probe = torch.randn(tokens, shape.hidden).to(weights.router.dtype)
    return float(route(shape, weights, probe)[1].unique().numel())


def run_shape(
    shape: Shape, counts: list[int], dtype: torch.dtype, peers: list[str], timing: Timing, kernels: Kernels
) -> list[Cell]:
    """All cells of a shape, printed as they come and as a table."""
    weights = random_weights(shape, dtype)
    moec = moec_layer(shape, weights, kernels.level, kernels.cache_dir)
    results: list[Cell] = []
    experts: dict[int, float] = {}
    for count in counts:
        with console.status(f"{shape.name}, {count} tokens"):
            cells = run_cell(shape, weights, moec, peers, count, timing)
        console.print(f"[dim]{one_line(cells)}[/dim]", soft_wrap=True)
        experts[count] = distinct_experts(shape, weights, count)
        results += cells
    console.print(report(shape, results, experts))
    del weights, moec
    gc.collect()
    return results


def write_cells(file: Path | None, machine: dict[str, Any], cells: list[Cell]) -> None:
    """All samples, beside what they were taken with, as JSON."""
    write_json(file, {**machine, "cells": cells})


def complaints(cells: list[Cell]) -> list[str]:
    """Candidates that are wrong, and peers that moec is slower than, one line each; printed."""
    found = []
    for c in cells:
        if is_wrong(c):
            found.append(f"{c.shape} T={c.tokens} {c.candidate}: error {c.error:.3f}")
        elif c.ratio is not None and c.candidate != "moec" and c.ratio <= 1:
            found.append(f"{c.shape} T={c.tokens} {c.candidate}: moec is slower, ratio {c.ratio:.2f}")
    for line in found:
        console.print(f"[red]{line}[/red]")
    return found


def main(
    shape: Annotated[str, typer.Option(help=f"comma-separated: {', '.join(SHAPES)}")] = ",".join(SHAPES),
    tokens: Annotated[str, typer.Option(help="comma-separated token counts")] = "1,4,16,64,512,2048",
    against: Annotated[str, typer.Option(help=f"comma-separated: {', '.join(PEERS)}; empty: none")] = ",".join(PEERS),
    peers: Annotated[
        bool, typer.Option("--peers", help="other kernels and quantised weights; see `make peers`")
    ] = False,
    formats: Annotated[
        str, typer.Option(help=f"with --peers: {', '.join(GROUPS)}, or weight formats")
    ] = "bf16,int8,int4",
    rounds: Annotated[int, typer.Option(help="rounds per cell, at most")] = 15,
    budget_s: Annotated[float, typer.Option(help="seconds per cell after which no further round starts")] = 20.0,
    threads: Annotated[int, typer.Option(help="OpenMP threads, for everyone; 0: torch's choice")] = 0,
    cpu_clock: Annotated[bool, typer.Option(help="one thread, by its CPU time: for a machine that others use")] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    level: Annotated[str, typer.Option(help="instruction set of moec's kernels; empty: the best of this machine")] = "",
    gather_limit_gb: Annotated[float, typer.Option(help="batched_mm is left out where it gathers more")] = 3.0,
    cache_dir: Annotated[Path | None, typer.Option(help="where built kernels are kept")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="writes all times there")] = None,
) -> None:
    """Prints a table per shape and writes all samples with --json."""
    from moec.compiler.codegen.llvm import default_cache_dir
    from moec.runtime.launch.cpu_features import best_level

    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`", category=UserWarning)
    if cpu_clock:
        threads = 1
    if threads:
        torch.set_num_threads(threads)
    timing = Timing(time.thread_time if cpu_clock else time.perf_counter, rounds, budget_s, gather_limit_gb * 1e9)
    kernels = Kernels(level or best_level() or "avx2", cache_dir or default_cache_dir())
    shapes, counts = [parse_shape(n) for n in shape.split(",")], [int(t) for t in tokens.split(",")]
    if peers:
        found = run_peers(shapes, counts, formats.split(","), timing, kernels)
        write_cells(json_file, {"level": kernels.level}, found)
        raise typer.Exit(0)
    chosen = [p for p in against.split(",") if p]
    found = [c for s in shapes for c in run_shape(s, counts, getattr(torch, dtype), chosen, timing, kernels)]
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu_clock": cpu_clock}
    write_cells(json_file, machine | {"level": kernels.level}, found)
    raise typer.Exit(1 if complaints(found) else 0)


if __name__ == "__main__":
    typer.run(main)
