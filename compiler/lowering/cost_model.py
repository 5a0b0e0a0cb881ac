"""Predicted time of a kernel: a call's fixed cost, reading what no cache holds, and arithmetic.

What counts for choosing is the ratios, and those differ between processors: a library that multiplies on AMX is hard to
beat with vectors, the same library without it is not. So a target's level has the rates of a machine that has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from moec.compiler.kernels.spec import Cost

KERNEL_CALL_US = 1.5
LIBRARY_CALL_US = {"float32": 2.5, "bfloat16": 3.5}
ONEDNN_CALL_US = 14.0  # a oneDNN primitive: every prepacked linear, and every bfloat16 linear of ATen
THREADS_US = 3.0  # starting and joining the pool, where a kernel uses it
THREADED_FLOPS = 1 << 19


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of both cores.

    bytes_per_s: of reading.  code_us: of making a float of a stored code by torch.  flops_per_s: by what multiplies (a
    kernel's level, "library", "library attention") and what it multiplies: a dtype, or what becomes float32 in
    registers: row-major bfloat16 weights, "widened" (or in pairs: simd.Simd.pair_products), "codes", or pairs of
    bfloat16, "code_pairs".
    """

    bytes_per_s: float
    code_us: float
    flops_per_s: Mapping[tuple[str, str], float]


_SAPPHIRE_RAPIDS = {
    ("avx2", "float32"): 0.07e12,
    ("avx2", "codes"): 0.07e12,
    ("avx2", "widened"): 0.06e12,
    ("avx2", "int8"): 0.08e12,
    ("avx512f", "float32"): 0.135e12,
    ("avx512f", "codes"): 0.135e12,
    ("avx512f", "widened"): 0.12e12,
    ("avx512_bf16", "float32"): 0.135e12,
    ("avx512_bf16", "bfloat16"): 0.135e12,
    ("avx512_bf16", "codes"): 0.135e12,
    ("avx512_bf16", "code_pairs"): 0.135e12,
    ("avx512_bf16", "widened"): 0.135e12,
    ("avx512_bf16", "int8"): 0.25e12,
    ("amx_bf16", "float32"): 0.135e12,
    ("amx_bf16", "codes"): 0.135e12,
    ("amx_bf16", "widened"): 0.135e12,
    ("amx_bf16", "bfloat16"): 0.65e12,
    ("amx_bf16", "int8"): 1.1e12,
    ("library", "float32"): 0.34e12,
    ("library", "bfloat16"): 0.65e12,
    ("library attention", "float32"): 0.09e12,
    ("library attention", "bfloat16"): 0.37e12,
}
_ZEN_5 = {
    ("avx2", "float32"): 0.25e12,
    ("avx2", "codes"): 0.07e12,
    ("avx2", "widened"): 0.235e12,
    ("avx2", "int8"): 0.33e12,
    ("avx512f", "float32"): 0.45e12,
    ("avx512f", "codes"): 0.29e12,
    ("avx512f", "widened"): 0.44e12,
    ("avx512_bf16", "float32"): 0.45e12,
    ("avx512_bf16", "bfloat16"): 0.95e12,
    ("avx512_bf16", "codes"): 0.29e12,
    ("avx512_bf16", "code_pairs"): 0.6e12,
    ("avx512_bf16", "widened"): 0.65e12,
    ("avx512_bf16", "int8"): 1.7e12,
    ("library", "float32"): 0.21e12,
    ("library attention", "float32"): 0.12e12,
    ("library attention", "bfloat16"): 0.12e12,
}
MACHINES = {
    "avx2": Machine(46e9, 4.4e-3, _ZEN_5 | {("library", "bfloat16"): 0.056e12}),
    "avx512f": Machine(46e9, 4.4e-3, _ZEN_5 | {("library", "bfloat16"): 0.17e12}),
    "avx512_bf16": Machine(46e9, 4.4e-3, _ZEN_5 | {("library", "bfloat16"): 0.92e12}),
    "amx_bf16": Machine(26e9, 1.2e-3, _SAPPHIRE_RAPIDS),
}
"""By the target's level. With AMX: two cores of Sapphire Rapids, MKL in float32, oneDNN in bfloat16 (estimates for
large linear layers). Without: two cores of Zen 5, the library held to the level by its own environment variables.
benchmarks/machine_rates.py, bench_small_kernels.py and bench_moe_layer.py --level time what the rates are of."""

TOKEN_GRID = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Where candidates are compared; ranges of T end at these numbers."""


def kernel_us(cost: Cost, level: str, dtype: str, target: str | None) -> float:
    """Of one compiled kernel that overlaps reading and arithmetic. target: a level, None: none of them."""
    return _kernel_call_us(cost) + max(_read_us(cost, target), _compute_us(cost, level, dtype, target))


def streaming_us(cost: Cost, level: str, dtype: str, target: str | None) -> float:
    """Of a kernel that reads row-major weights once per few rows, where it pays for reading and for arithmetic."""
    read = _read_us(cost, target)
    compute = _compute_us(cost, level, "widened" if dtype == "bfloat16" else dtype, target)
    return _kernel_call_us(cost) + max(read, 0.68 * read + compute)


def library_us(cost: Cost, num_calls: float, dtype: str, target: str | None) -> float:
    """Of num_calls library calls that do the work together."""
    return LIBRARY_CALL_US[dtype] * num_calls + max(_read_us(cost, target), _compute_us(cost, "library", dtype, target))


def library_attention_us(cost: Cost, num_calls: float, dtype: str, target: str | None) -> float:
    """Of the library's attention: products of matrices that are as narrow as a head, and softmax between them."""
    compute = _compute_us(cost, "library attention", dtype, target)
    return LIBRARY_CALL_US[dtype] * num_calls + max(_read_us(cost, target), compute)


def library_experts_us(cost: Cost, num_calls: float, dtype: str, target: str | None) -> float:
    """Of experts one after the other: each weight is packed in every call, as by aten_linear_us."""
    packing_and_products = 2 * _read_us(cost, target) + _compute_us(cost, "library", dtype, target)
    return LIBRARY_CALL_US[dtype] * num_calls + packing_and_products


def aten_linear_us(cost: Cost, num_rows: int, dtype: str, target: str | None) -> float:
    """Of aten.linear: from three rows on it packs the weights in every call, so it goes through them twice."""
    fixed = ONEDNN_CALL_US if dtype == "bfloat16" else LIBRARY_CALL_US[dtype]
    if num_rows <= 2 and dtype == "float32":
        return fixed + _read_us(cost, target)
    return fixed + 2 * _read_us(cost, target) + _compute_us(cost, "library", dtype, target)


def prepacked_linear_us(cost: Cost, dtype: str, target: str | None) -> float:
    """Of oneDNN's linear on weights that were packed when the engine was loaded."""
    return ONEDNN_CALL_US + _read_us(cost, target) + _compute_us(cost, "library", dtype, target)


def decode_us(num_codes: float, target: str | None) -> float:
    """Of making floats of a stored weight's codes by torch."""
    return num_codes * _machine(target).code_us


def _kernel_call_us(cost: Cost) -> float:
    return KERNEL_CALL_US + (THREADS_US if cost.num_flops > THREADED_FLOPS else 0.0)


def _read_us(cost: Cost, target: str | None) -> float:
    return cost.num_bytes / _machine(target).bytes_per_s * 1e6


def _compute_us(cost: Cost, level: str, dtype: str, target: str | None) -> float:
    return cost.num_flops / _machine(target).flops_per_s[level, dtype] * 1e6


def _machine(target: str | None) -> Machine:
    return MACHINES[target or "avx2"]
