"""The experts kernels, best first: each serves its dtype's problems of those before it; quantised weights last."""

from __future__ import annotations

from moec.compiler.kernels.experts import (
    experts_amx_bf16,
    experts_amx_codes,
    experts_amx_int8,
    experts_avx2,
    experts_avx2_codes,
    experts_avx2_int8,
    experts_avx512_bf16,
    experts_avx512_codes,
    experts_avx512_int8,
    experts_avx512f,
    experts_avx512f_codes,
)
from moec.compiler.kernels.spec import ExpertsProblem, KernelSpec

SPECS: tuple[KernelSpec[ExpertsProblem], ...] = (
    experts_amx_bf16.SPEC,
    experts_avx512_bf16.SPEC,
    experts_avx512f.SPEC,
    experts_avx2.SPEC,
    experts_amx_int8.SPEC,
    experts_amx_codes.SPEC,
    experts_avx512_int8.SPEC,
    experts_avx512_codes.SPEC,
    experts_avx512f_codes.SPEC,
    experts_avx2_int8.SPEC,
    experts_avx2_codes.SPEC,
)
