"""Predicted time of a kernel: a call's fixed cost, reading what no cache holds, and arithmetic.

The figures come from two Sapphire Rapids cores (benchmarks/bench_small_kernels.py times the same kernels); those of
large bfloat16 linear layers are estimates. What counts for choosing is their ratios.
"""

from __future__ import annotations

from moec.compiler.kernels.spec import Cost

BYTES_PER_S = 26e9
KERNEL_CALL_US = 1.5
LIBRARY_CALL_US = {"float32": 2.5, "bfloat16": 3.5}
ONEDNN_CALL_US = 14.0  # a oneDNN primitive: every prepacked linear, and every bfloat16 linear of ATen
THREADS_US = 3.0  # starting and joining the pool, where a kernel uses it
THREADED_FLOPS = 1 << 19

FLOPS_PER_S = {
    ("avx2", "float32"): 0.07e12,
    ("avx2", "bfloat16"): 0.06e12,
    ("avx512f", "float32"): 0.135e12,
    ("avx512f", "bfloat16"): 0.12e12,
    ("avx512_bf16", "float32"): 0.135e12,
    ("avx512_bf16", "bfloat16"): 0.135e12,
    ("amx_bf16", "float32"): 0.135e12,
    ("amx_bf16", "bfloat16"): 0.65e12,
    ("avx2", "int8"): 0.08e12,
    ("avx512_bf16", "int8"): 0.25e12,
    ("amx_bf16", "int8"): 1.1e12,
    ("library", "float32"): 0.34e12,
    ("library", "bfloat16"): 0.65e12,
}
"""By instruction-set level and dtype, both cores. Library: MKL in float32, oneDNN on AMX in bfloat16."""

TOKEN_GRID = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Where candidates are compared; ranges of T end at these numbers."""


def kernel_us(cost: Cost, level: str, dtype: str) -> float:
    """Of one compiled kernel that overlaps reading and arithmetic."""
    fixed = KERNEL_CALL_US + (THREADS_US if cost.num_flops > THREADED_FLOPS else 0.0)
    return fixed + max(_read_us(cost), _compute_us(cost, level, dtype))


def streaming_us(cost: Cost, level: str, dtype: str) -> float:
    """Of a kernel that reads row-major weights once per few rows, where it pays for reading and for arithmetic."""
    fixed = KERNEL_CALL_US + (THREADS_US if cost.num_flops > THREADED_FLOPS else 0.0)
    return fixed + max(_read_us(cost), 0.68 * _read_us(cost) + _compute_us(cost, level, dtype))


def library_us(cost: Cost, num_calls: float, dtype: str) -> float:
    """Of num_calls library calls that do the work together."""
    return LIBRARY_CALL_US[dtype] * num_calls + max(_read_us(cost), _compute_us(cost, "library", dtype))


def aten_linear_us(cost: Cost, num_rows: int, dtype: str) -> float:
    """Of aten.linear: from three rows on it packs the weights in every call, so it goes through them twice."""
    fixed = ONEDNN_CALL_US if dtype == "bfloat16" else LIBRARY_CALL_US[dtype]
    if num_rows <= 2 and dtype == "float32":
        return fixed + _read_us(cost)
    return fixed + 2 * _read_us(cost) + _compute_us(cost, "library", dtype)


def prepacked_linear_us(cost: Cost, dtype: str) -> float:
    """Of oneDNN's linear on weights that were packed when the engine was loaded."""
    return ONEDNN_CALL_US + _read_us(cost) + _compute_us(cost, "library", dtype)


def _read_us(cost: Cost) -> float:
    return cost.num_bytes / BYTES_PER_S * 1e6


def _compute_us(cost: Cost, level: str, dtype: str) -> float:
    return cost.num_flops / FLOPS_PER_S[level, dtype] * 1e6
