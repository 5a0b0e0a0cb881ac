"""The experts kernels, best first: each serves every problem of the ones before it that has its dtype."""

from __future__ import annotations

from moec.compiler.kernels.experts import experts_amx_bf16, experts_avx2, experts_avx512_bf16, experts_avx512f
from moec.compiler.kernels.spec import ExpertsProblem, KernelSpec

SPECS: tuple[KernelSpec[ExpertsProblem], ...] = (
    experts_amx_bf16.SPEC,
    experts_avx512_bf16.SPEC,
    experts_avx512f.SPEC,
    experts_avx2.SPEC,
)
