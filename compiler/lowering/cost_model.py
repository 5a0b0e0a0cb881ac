"""Predicted time of a kernel: a call's fixed cost, and the slower of memory and arithmetic.

The figures are rates of two cores of the machine that moec is built on (facts in docs/kernels-cpu.md), measured with the
CPU clock; what counts for choosing is their ratios.
"""

from __future__ import annotations

from moec.compiler.kernels.spec import Cost

BYTES_PER_S = 14.4e9
KERNEL_CALL_US = 2.0
LIBRARY_CALL_US = 2.5
THREADS_US = 4.0  # starting and joining the pool, where a kernel uses it
THREADED_FLOPS = 1 << 18

FLOPS_PER_S = {
    ("avx2", "float32"): 0.05e12,
    ("avx2", "bfloat16"): 0.05e12,
    ("avx512f", "float32"): 0.10e12,
    ("avx512f", "bfloat16"): 0.10e12,
    ("avx512_bf16", "float32"): 0.10e12,
    ("avx512_bf16", "bfloat16"): 0.13e12,
    ("amx_bf16", "float32"): 0.10e12,
    ("amx_bf16", "bfloat16"): 0.65e12,
    ("library", "float32"): 0.09e12,
    ("library", "bfloat16"): 0.45e12,
}
"""By instruction-set level and dtype. Library bf16 is oneDNN on AMX without prepacked weights."""

TOKEN_GRID = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Where candidates are compared; ranges of T end at these numbers."""


def kernel_us(cost: Cost, level: str, dtype: str) -> float:
    """Of one compiled kernel."""
    fixed = KERNEL_CALL_US + (THREADS_US if cost.num_flops > THREADED_FLOPS else 0.0)
    return fixed + _work_us(cost, FLOPS_PER_S[level, dtype])


def library_us(cost: Cost, num_calls: float, dtype: str) -> float:
    """Of num_calls library calls that do the work together."""
    return LIBRARY_CALL_US * num_calls + _work_us(cost, FLOPS_PER_S["library", dtype])


def _work_us(cost: Cost, flops_per_s: float) -> float:
    return max(cost.num_bytes / BYTES_PER_S, cost.num_flops / flops_per_s) * 1e6
