"""What the runtime itself costs in a decode step: the same engine with every kernel replaced by a function that returns
at once.

    python benchmarks/bench_runtime_overhead.py [ENGINE] [--batch N] [--rounds N] [--ranks N]

Three figures, medians over rounds, in microseconds: a kernel step of the program (call, arguments and allocations), the
program's ATen and library steps together (they do real work), and what Engine.step adds around the program (checks,
cache places, inputs). Without ENGINE the tiny model of examples/ is compiled first. Exit code 1 when a kernel step
takes more than 3 us. With --ranks the tiny model runs on so many processes (TPn), and the figure is what rank 0 spends
outside of kernels, operators and collectives per step of its program (rank_overhead.py); exit code 1 above 10 us.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tvm_ffi
import typer
from rank_overhead import measure_rank
from rich.console import Console
from torch import Tensor

import moec
from moec.runtime.batch import Batch
from moec.runtime.engine import Engine
from moec.runtime.executor import Executor
from moec.runtime.format import weights_name
from moec.runtime.loader import map_weights

LIMIT_US, RANK_LIMIT_US = 3.0, 10.0
MODEL = Path(__file__).parent.parent / "examples" / "data" / "tiny-moe"
console = Console()


class Recorded:
    """An executor that notes how long each call took and on what. seconds, inputs, batch: of the last call."""

    def __init__(self, executor: Executor) -> None:
        self.executor, self.program = executor, executor.program
        self.seconds, self.inputs, self.batch = 0.0, [], None  # type: float, Sequence[Tensor], Batch | None

    def __call__(self, inputs: Sequence[Tensor], batch: Batch | None = None) -> list[Tensor]:
        before = time.perf_counter()
        outputs = self.executor(inputs, batch)
        self.seconds, self.inputs, self.batch = time.perf_counter() - before, inputs, batch
        return outputs


def without_kernels(engine: Engine) -> tuple[Engine, Recorded]:
    """The engine with the same program, whose kernels do nothing: results are whatever the buffers held."""
    nothing = tvm_ffi.get_global_func("testing.nop")
    kernels = dict.fromkeys(engine.manifest["target"].get("symbols", []), nothing)
    weights = map_weights(engine.directory / weights_name(0))
    recorded = Recorded(Executor(engine.executor.program, weights, kernels, tvm_ffi.from_dlpack))
    executor: Any = recorded
    return Engine(engine.directory, engine.manifest, executor), recorded


def measure(engine: Engine, batch: int, rounds: int) -> dict[str, float]:
    """Medians in microseconds over decode steps of `batch` sequences."""
    bare, recorded = without_kernels(engine)
    cache = bare.new_cache(batch, rounds + 4)
    slots = [cache.allocate() for _ in range(batch)]
    steps: dict[str, list[float]] = {
        "program": [],
        "around it": [],
        "kernel steps": [],
        "one kernel step": [],
        "rest": [],
    }
    for number in range(rounds + 1):
        before = time.perf_counter()
        bare.step(cache, slots, [[1]] * batch)
        whole = time.perf_counter() - before
        timed = recorded.executor.profile(recorded.inputs, recorded.batch)
        kernels = [us for step, us in timed if step.kind == "kernel"]
        if not number:
            continue  # warms up
        steps["program"].append(recorded.seconds * 1e6)
        steps["around it"].append((whole - recorded.seconds) * 1e6)
        steps["kernel steps"].append(len(kernels))
        steps["one kernel step"].append(sum(kernels) / max(len(kernels), 1))
        steps["rest"].append(sum(us for _, us in timed) - sum(kernels))
    return {name: statistics.median(values) for name, values in steps.items()}


def main(
    engine: Annotated[Path | None, typer.Argument(help="an engine of a language model")] = None,
    batch: Annotated[int, typer.Option(help="sequences in the step")] = 1,
    rounds: Annotated[int, typer.Option(help="steps")] = 200,
    ranks: Annotated[int, typer.Option(help="processes; 1: no placed engine")] = 1,
) -> None:
    """Measures and prints."""
    if ranks > 1:
        _rank_zero(ranks, batch, rounds)
        return
    with tempfile.TemporaryDirectory(prefix="moec-bench-") as folder:
        path = engine or Path(folder) / "tiny.engine"
        loaded = moec.load(path) if engine else moec.compile(MODEL, verify="off", output=path)
        result = measure(loaded, batch, rounds)
    console.print(f"decode step of {batch} sequence(s), kernels replaced by functions that do nothing:")
    console.print(f"  one kernel step          {result['one kernel step']:7.2f} us, of {result['kernel steps']:.0f}")
    console.print(f"  ATen and library steps   {result['rest']:7.2f} us together")
    console.print(f"  whole program            {result['program']:7.2f} us")
    console.print(f"  Engine.step around it    {result['around it']:7.2f} us")
    if result["one kernel step"] > LIMIT_US:
        raise typer.Exit(1)


def _rank_zero(ranks: int, batch: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="moec-bench-") as folder:
        path = Path(folder) / "tiny.engine"
        moec.compile_ranks(MODEL, path, moec.RankOptions(devices=ranks, strategy=f"TP{ranks}"), verify="off")
        engine = moec.load(path)
        result = measure_rank(engine, batch, rounds)
        engine.close()
    console.print(f"decode step of {batch} sequence(s) on rank 0 of {ranks}, {result['steps']:.0f} calls:")
    console.print(f"  Engine.step              {result['step']:7.2f} us")
    console.print(f"  kernels and collectives  {result['inside']:7.2f} us")
    console.print(f"  outside, per call        {result['outside']:7.2f} us")
    if result["outside"] > RANK_LIMIT_US:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
