"""What this machine can do at best: bytes read and bf16 products in a second, on all of torch's threads.

The least time of a layer is the larger of its bytes over the one and its operations over the other; no kernel is
faster, whatever tuning chooses.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from moe_layers import empty_huge
from moe_stream import build_stream

from moec.runtime.launch.cpu import load_library
from moec.runtime.launch.cpu_features import best_level

_READ_BYTES, _PARTS = 1 << 30, 64
_READS_PER_PASS = 16  # parts, taken in an order of their own in each pass: none is in a cache from the pass before
_PASSES = 15
_PRODUCTS = 1 << 16  # rounds of six tile products on each thread
_TILE_FLOPS = 2 * 16 * 16 * 32


@dataclasses.dataclass(frozen=True)
class Rates:
    """bytes_per_s, flops_per_s (None: the processor has no tile unit, so operations bound nothing here)."""

    bytes_per_s: float
    flops_per_s: float | None

    def least_us(self, num_bytes: float, flops: float) -> float:
        """Microseconds that so much work takes at least, reading and multiplying at the same time."""
        compute = flops / self.flops_per_s if self.flops_per_s else 0.0
        return 1e6 * max(num_bytes / self.bytes_per_s, compute)


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


def _product_rate(cache_dir: Path) -> float | None:
    if best_level() != "amx_bf16":
        return None
    multiply, count = build_products(cache_dir), torch.tensor([_PRODUCTS], dtype=torch.int32)
    rates = []
    for _ in range(_PASSES):
        threads = torch.zeros(1, dtype=torch.int32)
        started = time.perf_counter()
        multiply(count, threads)
        took = time.perf_counter() - started
        rates.append(int(threads) * _PRODUCTS * 6 * _TILE_FLOPS / took)
    return statistics.median(rates)


def build_products(cache_dir: Path) -> Callable[..., None]:
    """-> multiply(rounds i32[1], threads i32[1] of zero): six independent tile products a round, registers alone.

    Every thread counts itself in `threads`.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    from moec.compiler.codegen.llvm import build_library
    from moec.compiler.kernels.experts.tiles_amx import TileConfig
    from moec.compiler.kernels.template import intrinsics as ins
    from moec.compiler.kernels.template.flow import on_threads

    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("multiply")
        T.func_attr({"tirx.noalias": True})
        rounds = T.match_buffer(T.arg("rounds", T.handle()), (1,), "int32", align=4)
        threads = T.match_buffer(T.arg("threads", T.handle()), (1,), "int32", align=4)
        with ins.intrinsics("amx_bf16"):
            num_rounds = ins.let(rounds[0])

            def worker() -> Callable[[], None]:
                config = TileConfig()

                def work() -> None:
                    config.all_rows(T.int32(16))
                    ins.let(ins.fetch_add(T.address_of(threads[0]), 1))
                    for tile in range(8):
                        ins.tile_zero(tile)
                    with T.serial(num_rounds):
                        for total in range(6):
                            ins.tile_dot_bf16(total, 6, 7)
                    ins.tile_release()

                return work

            on_threads(worker)
    built = build_library({"multiply": ib.get()}, "amx_bf16", cache_dir)
    return load_library(built.path, built.level)["multiply"]
