"""What this machine can do at best, and how much of it at once: reading weights and multiplying.

    python benchmarks/machine_rates.py

Prints bytes read and operations in a second on all of torch's threads: of bf16 products on the AMX unit or in vectors,
of f32 products where the processor has no others. With AMX then, for a panel of weights as the experts kernels have it
(32 columns of 2048, 128 KiB) and a number of rows, the microseconds of a thread for reading it from memory, for its
products with everything in the second-level cache, and for both, the next panel being asked for during the products of
this one. Where both take little more than the longer one, reading and multiplying overlap.

The least time of a layer is the larger of its bytes over the one rate and its operations over the other. How far
the kernels are from it is a column of bench_tuning.py.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from moe_layers import empty_huge
from moe_stream import build_stream
from rich.console import Console
from rich.table import Table

from moec.compiler.codegen.llvm import default_cache_dir
from moec.runtime.launch.cpu import load_library
from moec.runtime.launch.cpu_features import best_level

_READ_BYTES, _PARTS = 1 << 30, 64
_READS_PER_PASS = 16  # parts, taken in an order of their own in each pass: none is in a cache from the pass before
_PASSES = 15
_ROUNDS = 1 << 16  # of six tile products, on each thread
_VECTOR_TOTALS = {16: 24, 8: 12}  # lanes -> sums in registers, as the experts kernels have them
_TILE_BYTES, _TILE_FLOPS, _LINE = 1024, 2 * 16 * 16 * 32, 64
_DEPTH = 64  # k steps of a panel
_PANEL_BYTES, _STEP_ROWS = _DEPTH * 2 * _TILE_BYTES, 48
_PANELS = 800  # of a thread: no cache holds them
_ROWS_BYTES = 8 << 20  # room for a thread's rows
_SECOND_LEVEL = 2  # of a prefetch


@dataclasses.dataclass(frozen=True)
class Rates:
    """bytes_per_s; flops_per_s: of the widest products of bf16 numbers."""

    bytes_per_s: float
    flops_per_s: float

    def least_us(self, num_bytes: float, flops: float) -> float:
        """Microseconds that so much work takes at least, reading and multiplying at the same time."""
        return 1e6 * max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


def measure_rates(cache_dir: Path) -> Rates:
    """Medians of passes. Needs 1 GiB of memory and about a second."""
    return Rates(_read_rate(cache_dir), _product_rate(cache_dir))


def _read_rate(cache_dir: Path) -> float:
    read, words = build_stream(cache_dir), empty_huge((_READ_BYTES // 4,), torch.int32).fill_(1)
    scratch, rates = torch.zeros(64, dtype=torch.int32), []
    for number in range(_PASSES):
        order = torch.randperm(_PARTS, generator=torch.Generator().manual_seed(number))
        parts = order[:_READS_PER_PASS].to(torch.int32)
        scratch.zero_()
        started = time.perf_counter()
        read(words, parts, scratch, words.numel() // _PARTS)
        rates.append(_READ_BYTES / _PARTS * _READS_PER_PASS / (time.perf_counter() - started))
    return statistics.median(rates)


def _product_rate(cache_dir: Path) -> float:
    level = best_level() or "avx2"
    if level == "amx_bf16":
        multiply, flops, tensors = build_products(cache_dir), 6 * _TILE_FLOPS, []
    else:
        multiply, flops = build_vector_products(level, cache_dir)
        tensors = [torch.zeros(64 * torch.get_num_threads(), dtype=torch.uint8)]
    rates = []
    for _ in range(_PASSES):
        took, threads = _timed(multiply, _ROUNDS, *tensors)
        rates.append(threads * _ROUNDS * flops / took)
    return statistics.median(rates)


def _timed(function: Callable[..., None], count: int, *tensors: torch.Tensor) -> tuple[float, int]:
    """Seconds of a call, and the threads that took part."""
    threads = torch.zeros(1, dtype=torch.int32)
    started = time.perf_counter()
    function(torch.tensor([count], dtype=torch.int32), threads, *tensors)
    return time.perf_counter() - started, int(threads)


def build_products(cache_dir: Path) -> Callable[..., None]:
    """-> multiply(rounds i32[1], threads i32[1] of zero): six independent tile products a round, registers alone.

    Every thread counts itself in `threads`, here and in build_panels.
    """
    from tvm.tirx.script import builder as T

    from moec.compiler.kernels.template import intrinsics as ins

    def work(rounds: Any, me: Any) -> None:
        with T.serial(rounds):
            for total in range(6):
                ins.tile_dot_bf16(total, 6, 7)

    return _build("multiply", "amx_bf16", 0, work, cache_dir)


def build_vector_products(level: str, cache_dir: Path) -> tuple[Callable[..., None], int]:
    """-> multiply(rounds i32[1], threads i32[1] of zero, u8[64 * threads]), operations of a round: independent sums."""
    from tvm.tirx.script import builder as T

    from moec.compiler.kernels.template import intrinsics as ins
    from moec.compiler.kernels.template.flow import Vector

    lanes, pairs = ins.lanes_of(level), ins.has_dot(level)
    count = _VECTOR_TOTALS[lanes]
    product = ins.dot_bf16 if pairs else lambda total, left, right: T.fma(left, right, total)

    def work(rounds: Any, me: Any, out: Any) -> None:
        totals = [Vector(lanes) for _ in range(count)]
        for number, total in enumerate(totals):  # equal sums would be made one
            total.set(T.broadcast(T.float32(number), lanes))
        factor = T.Bind(T.broadcast(T.Cast("int32" if pairs else "float32", me), lanes))
        with T.serial(rounds):
            for total in totals:
                total.set(product(total.value, factor, factor))
        for total in totals[1:]:  # a use of all sums, or they would be left out
            totals[0].set(totals[0].value + total.value)
        ins.store_f32(T.address_of(out[me * 64]), totals[0].value, lanes)

    return _build("multiply", level, 1, work, cache_dir), count * lanes * (4 if pairs else 2)


def build_panels(units: int, reads: bool, multiplies: bool, cache_dir: Path) -> Callable[..., None]:
    """-> panels(number i32[1], threads i32[1] of zero, rows u8[..], weights u8[..]): panels times units of 48 rows.

    reads: each panel lies behind the one before, and is asked for during its products; else all are the same.
    """
    from tvm.tirx.script import builder as T

    from moec.compiler.kernels.template import intrinsics as ins

    share = 2 * _TILE_BYTES // _LINE // units  # lines of the next panel that a k step asks for

    def work(panels: Any, me: Any, rows: Any, weights: Any) -> None:
        with T.serial(panels) as p:
            own = T.Cast("int64", me) * T.Cast("int64", panels) + T.Cast("int64", p) if reads else T.Cast("int64", me)
            panel = ins.let(own * _PANEL_BYTES)
            for unit in range(units):
                first = ins.let(T.Cast("int64", me) * _ROWS_BYTES + unit * (3 * _DEPTH * _TILE_BYTES))
                with T.serial(_DEPTH) as step:
                    k = T.Cast("int64", step)
                    at, row = ins.let(panel + k * (2 * _TILE_BYTES)), ins.let(first + k * _TILE_BYTES)
                    ahead = ins.let(panel + _PANEL_BYTES + (k + unit * _DEPTH) * (share * _LINE))
                    for half, order in enumerate(((0, 1, 2), (2, 1, 0))):
                        if multiplies:
                            ins.tile_load(7, T.address_of(weights[at + half * _TILE_BYTES]), T.int64(_LINE))
                        for place, block in enumerate(order):
                            if multiplies and (half == 0 or place):
                                source = T.address_of(rows[row + block * (_DEPTH * _TILE_BYTES)])
                                ins.tile_load(6, source, T.int64(_LINE))
                            if multiplies:
                                ins.tile_dot_bf16(2 * block + half, 6, 7)
                            part = 3 * half + place
                            for line in range(part * share // 6, (part + 1) * share // 6 if reads else 0):
                                ins.prefetch(T.address_of(weights[ahead + line * _LINE]), _SECOND_LEVEL)

    return _build("panels", "amx_bf16", 2, work, cache_dir)


def _build(name: str, level: str, tensors: int, work: Callable[..., None], cache_dir: Path) -> Callable[..., None]:
    """-> f(count i32[1], threads i32[1], u8 tensors), which does work(count, thread number, *tensors) on each.

    At level amx_bf16 the tiles are set up around it.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    from moec.compiler.codegen.llvm import build_library
    from moec.compiler.kernels.experts.tiles_amx import TileConfig
    from moec.compiler.kernels.template import intrinsics as ins
    from moec.compiler.kernels.template.flow import on_threads

    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True})
        sizes = [T.int64() for _ in range(tensors)]
        count, threads = (T.match_buffer(T.arg(n, T.handle()), (1,), "int32", align=4) for n in ("count", "threads"))
        given = [T.match_buffer(T.arg(f"t{i}", T.handle()), (size,), "uint8", align=64) for i, size in enumerate(sizes)]
        with ins.intrinsics(level):
            number = ins.let(count[0])

            def with_tiles(then: Callable[[], None]) -> Callable[[], None]:
                config = TileConfig()

                def on_thread() -> None:
                    config.all_rows(T.int32(16))
                    for tile in range(8):
                        ins.tile_zero(tile)
                    then()
                    ins.tile_release()

                return on_thread

            def own_work() -> None:
                work(number, ins.let(ins.fetch_add(T.address_of(threads[0]), 1)), *given)

            def worker() -> Callable[[], None]:
                return with_tiles(own_work) if level == "amx_bf16" else own_work

            on_threads(worker)
    built = build_library({name: ib.get()}, level, cache_dir)
    return load_library(built.path, built.level)[name]


def panel_times(units: int, cache_dir: Path) -> tuple[float, float, float]:
    """Microseconds of a panel: read alone, products alone, both at once."""
    ways = [build_panels(units, *way, cache_dir) for way in ((True, False), (False, True), (True, True))]
    num = torch.get_num_threads()
    rows = torch.zeros(num * _ROWS_BYTES, dtype=torch.uint8)
    weights = empty_huge((_PANEL_BYTES * (num * _PANELS + 1),), torch.uint8).fill_(0)
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(_PASSES):
        for way, found in zip(ways, times, strict=True):
            found.append(1e6 * _timed(way, _PANELS, rows, weights)[0] / _PANELS)
    read, products, both = (statistics.median(t) for t in times)
    return read, products, both


def main() -> None:
    """Prints the rates, and the table where there is a tile unit."""
    console, cache_dir = Console(), default_cache_dir()
    rates = measure_rates(cache_dir)
    console.print(f"{torch.get_num_threads()} threads read {rates.bytes_per_s / 1e9:.1f} GB/s")
    level = best_level() or "avx2"
    kind = "f32" if level in ("avx2", "avx512f") else "bf16"
    console.print(f"{rates.flops_per_s / 1e12:.2f} TFLOP/s of {kind} products ({level}), from registers alone")
    if level != "amx_bf16":
        return
    table = Table("rows of an expert", "read alone, us", "products alone, us", "both, us", "both / the longer")
    for units in (1, 2, 4):
        read, products, both = panel_times(units, cache_dir)
        cells = (f"{value:.2f}" for value in (read, products, both, both / max(read, products)))
        table.add_row(str(units * _STEP_ROWS), *cells)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
