"""The experts kernels, best first: each serves its dtype's problems of those before it; quantised weights last.

To add one, write its tiles (tiles.py says what they are) and list it.
"""

from __future__ import annotations

import dataclasses

from moec.compiler.kernels.experts import call
from moec.compiler.kernels.experts.blocking import Blocking
from moec.compiler.kernels.experts.kernel import ExpertsKernel
from moec.compiler.kernels.experts.plan import Plan
from moec.compiler.kernels.experts.tiles import Tiles
from moec.compiler.kernels.experts.tiles_amx import AmxTiles
from moec.compiler.kernels.experts.tiles_codes_amx import AmxCodeTiles
from moec.compiler.kernels.experts.tiles_codes_vector import DOT_INT8, PAIRS_INT8, vector_code_tiles
from moec.compiler.kernels.experts.tiles_vector import (
    AVX2_ROWS,
    AVX512_ROWS,
    DOT_BF16,
    F32,
    WIDEN_BF16,
    vector_tiles,
)
from moec.compiler.kernels.spec import ExpertsProblem, KernelSpec

BF16, BOTH = ("bfloat16",), ("bfloat16", "float32")
AMX = Blocking(
    block_rows=16, step_rows=48, wide_rows=False, l2_bytes=1 << 20, chunk_bytes=1 << 20,
    split_rows=32, split_rows_short=8, split_rows_exponents=3,
)  # fmt: skip
AVX512 = Blocking(
    block_rows=AVX512_ROWS, step_rows=AVX512_ROWS, wide_rows=False, l2_bytes=1 << 20, chunk_bytes=1 << 20,
    ahead_blocks=4, ahead_few=(1, 1, 2, 2), locality_once=0, locality_full=0, even_blocks=True,
    share_rows=AVX512_ROWS // 2,
)  # fmt: skip
AVX512_WIDE = dataclasses.replace(AVX512, wide_rows=True, ahead_few=(), locality_full=2, share_rows=AVX512_ROWS)
AVX2 = Blocking(
    block_rows=AVX2_ROWS, step_rows=AVX2_ROWS, wide_rows=False, l2_bytes=1 << 18, chunk_bytes=1 << 18,
    ahead_blocks=4, locality_once=0, even_blocks=True, share_rows=AVX2_ROWS // 2,
)  # fmt: skip
AVX2_WIDE = dataclasses.replace(AVX2, wide_rows=True)


def _widened(plan: Plan) -> Tiles:
    return vector_tiles(plan, F32 if plan.problem.dtype == "float32" else WIDEN_BF16)


def _widened_codes(plan: Plan) -> Tiles:
    return vector_code_tiles(plan, WIDEN_BF16)


# weights as the problem's dtype says. AMX, AVX512-BF16: rows bf16, products of pairs, sums f32. Else: rows f32, bf16
# weights widened in registers
AMX_BF16 = ExpertsKernel("experts-amx-bf16", "amx_bf16", BF16, AMX, AmxTiles)
AVX512_BF16 = ExpertsKernel(
    "experts-avx512-bf16", "avx512_bf16", BF16, AVX512, lambda plan: vector_tiles(plan, DOT_BF16)
)
AVX512F = ExpertsKernel("experts-avx512f", "avx512f", BOTH, AVX512_WIDE, _widened)
AVX2_FMA = ExpertsKernel("experts-avx2", "avx2", BOTH, AVX2_WIDE, _widened)
# quantised weights, rows rounded to int8: sums i32 over a group, then f32
AMX_INT8 = ExpertsKernel("experts-amx-int8", "amx_bf16", BF16, AMX, AmxCodeTiles, call.INT8)
AVX512_INT8 = ExpertsKernel(
    "experts-avx512-int8", "avx512_bf16", BF16, AVX512, lambda plan: vector_code_tiles(plan, DOT_INT8), call.INT8
)
AVX2_INT8 = ExpertsKernel(
    "experts-avx2-int8", "avx2", BOTH, AVX2, lambda plan: vector_code_tiles(plan, PAIRS_INT8), call.INT8
)
# quantised weights, rows as they are: the codes' numbers become bf16 (AMX, AVX512-BF16) or f32, sums f32
AMX_CODES = ExpertsKernel("experts-amx-codes", "amx_bf16", BF16, AMX, AmxCodeTiles, call.NUMBERS)
AVX512_CODES = ExpertsKernel(
    "experts-avx512-codes", "avx512_bf16", BF16, AVX512, lambda plan: vector_code_tiles(plan, DOT_BF16), call.NUMBERS
)
AVX512F_CODES = ExpertsKernel("experts-avx512f-codes", "avx512f", BOTH, AVX512_WIDE, _widened_codes, call.NUMBERS)
AVX2_CODES = ExpertsKernel("experts-avx2-codes", "avx2", BOTH, AVX2_WIDE, _widened_codes, call.NUMBERS)

KERNELS = (
    AMX_BF16, AVX512_BF16, AVX512F, AVX2_FMA, AMX_INT8, AMX_CODES, AVX512_INT8, AVX512_CODES, AVX512F_CODES, AVX2_INT8,
    AVX2_CODES,
)  # fmt: skip
SPECS: tuple[KernelSpec[ExpertsProblem], ...] = tuple(kernel.spec() for kernel in KERNELS)
