"""moec::experts on AVX512-BF16 for quantised weights and bf16 rows: pair products of the codes' numbers, sums f32."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moec.compiler.kernels.experts import call
from moec.compiler.kernels.experts.call import PackedExperts
from moec.compiler.kernels.experts.plan import Blocking, Plan
from moec.compiler.kernels.experts.template import build_experts
from moec.compiler.kernels.experts.tiles_codes_vector import vector_code_tiles
from moec.compiler.kernels.experts.tiles_vector import AVX512_ROWS, DOT_BF16
from moec.compiler.kernels.spec import ExpertsProblem, KernelSpec

LEVEL = "avx512_bf16"
DTYPES = ("bfloat16",)
BLOCKING = Blocking(block_rows=AVX512_ROWS, step_rows=AVX512_ROWS, wide_rows=False, l2_bytes=1 << 20)


def plan(problem: ExpertsProblem) -> Plan:
    """The kernel's numbers for a problem: padded sizes, blocking, workspace."""
    return Plan(problem, LEVEL, BLOCKING)


def build(problem: ExpertsProblem) -> dict[str, Any]:
    """{exported name: PrimFunc}; tensors in the order of call.argument_names(problem)."""
    return {call.symbol(problem): build_experts(plan(problem), vector_code_tiles(plan(problem), DOT_BF16))}


SPEC: KernelSpec[ExpertsProblem] = KernelSpec(
    name="experts-avx512-codes",
    op="moec::experts",
    level=LEVEL,
    supports=lambda problem: call.refusal(problem, DTYPES, call.NUMBERS),
    cost=call.cost,
    symbols=lambda problem: (call.symbol(problem),),
    build=build,
    pack=call.weight_layout,
    workspace_bytes=lambda problem, num_tokens: plan(problem).workspace_bytes(num_tokens),
)


def experts_avx512_codes(
    library: Any,
    problem: ExpertsProblem,
    packed: PackedExperts,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    shared_weight: Tensor | None = None,
) -> Tensor:
    """The kernel on torch tensors, see call.call. Raises: KernelArgumentError."""
    return call.call(library, plan(problem), packed, x, weights, experts, shared_weight)
