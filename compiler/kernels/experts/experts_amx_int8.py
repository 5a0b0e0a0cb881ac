"""moec::experts on AMX for quantised weights and rows in int8: codes are tiles of bytes, sums i32, then f32."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moec.compiler.kernels.experts import call
from moec.compiler.kernels.experts.call import PackedExperts
from moec.compiler.kernels.experts.plan import Blocking, Plan
from moec.compiler.kernels.experts.template import build_experts
from moec.compiler.kernels.experts.tiles_codes_amx import AmxCodeTiles
from moec.compiler.kernels.spec import ExpertsProblem, KernelSpec

LEVEL = "amx_bf16"
DTYPES = ("bfloat16",)
BLOCKING = Blocking(block_rows=16, step_rows=48, wide_rows=False, l2_bytes=1 << 20)


def plan(problem: ExpertsProblem) -> Plan:
    """The kernel's numbers for a problem: padded sizes, blocking, workspace."""
    return Plan(problem, LEVEL, BLOCKING)


def build(problem: ExpertsProblem) -> dict[str, Any]:
    """{exported name: PrimFunc}; tensors in the order of call.argument_names(problem)."""
    return {call.symbol(problem): build_experts(plan(problem), AmxCodeTiles(plan(problem)))}


SPEC: KernelSpec[ExpertsProblem] = KernelSpec(
    name="experts-amx-int8",
    op="moec::experts",
    level=LEVEL,
    supports=lambda problem: call.refusal(problem, DTYPES, call.INT8),
    cost=call.cost,
    symbols=lambda problem: (call.symbol(problem),),
    build=build,
    pack=call.weight_layout,
    arithmetic="int8",
    workspace_bytes=lambda problem, num_tokens: plan(problem).workspace_bytes(num_tokens),
)


def experts_amx_int8(
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
