"""Times the kernels around the experts against the library functions that stand in for them, one op at a time.

    python benchmarks/bench_small_kernels.py [--ops norm,gate,..] [--tokens 1,4,..] [--threads N] [--json F]

Kernel and library run in turn, round after round; the table shows medians and the median of the rounds' ratios, above 1
where the kernel is faster. With one thread (the default) the clock is that thread's own, so other work on the machine
counts less; with more it is the wall's. Exit code 1 when results differ.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from results_file import write_json
from rich.console import Console
from rich.table import Table
from small_kernels import CASES, Case

ROUNDS = 11
ROUND_S = 2e-3  # calls are repeated until a round takes about this long
console = Console()


@dataclasses.dataclass
class Result:
    """Medians over the rounds; ratio: library / kernel of the same round."""

    name: str
    dtype: str
    tokens: int
    kernel_us: float
    library_us: float
    ratio: float
    gigabytes_per_s: float
    error: float
    right: bool


def time_case(case: Case, dtype: str, clock: Callable[[], float], budget_s: float) -> Result:
    """Checks and times one case."""
    got, want = case.kernel(0).double(), case.peer(0).double()
    error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
    sides = (case.kernel, case.peer)
    repeats = [_repeats(f) for f in sides]
    times: tuple[list[float], list[float]] = ([], [])
    start, at = time.perf_counter(), 0
    for _ in range(ROUNDS):
        for side, count, samples in zip(sides, repeats, times, strict=True):
            begin = clock()
            for i in range(count):
                side(at + i)
            samples.append((clock() - begin) / count * 1e6)
        at += max(repeats)
        if time.perf_counter() - start > budget_s:
            break
    medians = [statistics.median(t) for t in times]
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    speed = case.num_bytes / medians[0] / 1e3
    return Result(case.name, dtype, case.tokens, *medians, ratio, speed, error, error <= case.tolerance)


def _repeats(side: Callable[[int], Any]) -> int:
    begin = time.perf_counter()
    side(1)
    return max(1, min(200, int(ROUND_S / (time.perf_counter() - begin))))


def report(results: list[Result]) -> Table:
    """One row per case and token count."""
    table = Table("op", "dtype", "T", "kernel us", "library us", "ratio", "GB/s", "error", title="small kernels")
    for column in table.columns[2:]:
        column.justify = "right"
    for r in results:
        colour = "green" if r.ratio > 1 else "red"
        speed = f"{r.gigabytes_per_s:.1f}" if r.gigabytes_per_s else ""
        ratio = f"[{colour}]{r.ratio:.2f}[/{colour}]" if r.right else "[red]wrong[/red]"
        row = (r.name, r.dtype, str(r.tokens), f"{r.kernel_us:.1f}", f"{r.library_us:.1f}", ratio, speed)
        table.add_row(*row, f"{r.error:.0e}")
    return table


def main(
    ops: Annotated[str, typer.Option(help=f"comma-separated: {', '.join(CASES)}")] = ",".join(CASES),
    tokens: Annotated[str, typer.Option(help="comma-separated token counts")] = "1,4,16,64,512",
    dtypes: Annotated[str, typer.Option(help="comma-separated: bfloat16, float32")] = "bfloat16,float32",
    threads: Annotated[int, typer.Option(help="OpenMP threads of both sides")] = 1,
    level: Annotated[str, typer.Option(help="instruction set of the kernels; empty: the best of this machine")] = "",
    budget_s: Annotated[float, typer.Option(help="seconds per case after which no further round starts")] = 2.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="writes all results there")] = None,
) -> None:
    """Prints one table."""
    from moec.compiler.codegen.llvm import build_library
    from moec.runtime.launch.cpu import load_library
    from moec.runtime.launch.cpu_features import best_level

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    counts, results = [int(t) for t in tokens.split(",")], []
    with tempfile.TemporaryDirectory() as folder:

        def load(functions: dict[str, Any], for_level: str) -> Any:
            built = build_library(functions, for_level, Path(folder))
            return load_library(built.path, built.level)

        for op in ops.split(","):
            for dtype in dtypes.split(","):
                for case in CASES[op](load, level or best_level() or "avx2", dtype, counts):
                    with console.status(f"{case.name} {dtype} T={case.tokens}"):
                        results.append(time_case(case, dtype, clock, budget_s))
    console.print(report(results))
    write_json(json_file, results)
    raise typer.Exit(0 if all(r.right for r in results) else 1)


if __name__ == "__main__":
    typer.run(main)
