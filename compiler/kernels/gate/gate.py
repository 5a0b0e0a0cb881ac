"""moec::gate: weights and experts from logits that a GEMM has made, tokens in parallel.

Call: symbol(logits, weights, experts), or symbol(logits, selection_bias, weights, experts) where the spec uses a bias.
logits [T,E] any row stride, weights f32[T,K], experts i32[T,K]. Experts equal GateSpec.apply's wherever the scores do;
weights are within 4e-6 relative of a float64 evaluation in float32, and one bf16 step where scores are bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moec.compiler.kernels.checks import require, rows_readable
from moec.compiler.kernels.gate.problem import GateProblem
from moec.compiler.kernels.gate.route import emit_route
from moec.compiler.kernels.simd import DTYPE_BYTES, Simd, for_rows, match
from moec.compiler.kernels.spec import Cost, vector_specs

SERIAL_SCORES = 2048  # tokens times experts below which a second thread costs more than it saves


def symbol(problem: GateProblem) -> str:
    """The function's name in a library."""
    return f"moec_gate_{problem.tag()}"


def emit_tokens(
    v: Simd, problem: GateProblem, num_tokens: Any, logits: Any, bias: Any | None, weights: Any, experts: Any
) -> None:
    """The gate of every token: buffers logits [T,E], bias [E], weights f32[T,K], experts i32[T,K]."""

    def token(t: Any) -> None:
        emit_route(
            v,
            problem,
            lambda e: logits[t, e],
            None if bias is None else lambda e: bias[e],
            lambda k, value: T.buffer_store(weights, value, [t, k]),
            lambda k, expert: T.buffer_store(experts, expert, [t, k]),
        )

    for_rows(num_tokens, num_tokens * problem.num_experts <= SERIAL_SCORES, token)


def build(problem: GateProblem, level: str) -> dict[str, Any]:
    """The kernel for an instruction-set level: {exported name: PrimFunc}."""
    v, num_experts, top_k = Simd.of(level).exact(), problem.num_experts, problem.gate.top_k
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(symbol(problem))
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        logits = match("logits", problem.logits_dtype, (n, num_experts), strided=1)
        bias = None
        if problem.selection_bias_dtype is not None:
            bias = match("selection_bias", problem.selection_bias_dtype, (num_experts,))
        weights, experts = match("weights", "float32", (n, top_k)), match("experts", "int32", (n, top_k))
        with v.prelude():
            emit_tokens(v, problem, n, logits, bias, weights, experts)
    return {symbol(problem): ib.get()}


def gate(library: Any, problem: GateProblem, logits: Tensor, selection_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The kernel on torch tensors: logits [T,E] -> weights f32[T,K], experts i32[T,K]. Raises: KernelArgumentError."""
    require(problem.refusal() is None, "moec::gate", f"{problem.refusal()}")
    require(logits.dim() == 2 and logits.shape[1] == problem.num_experts, "moec::gate", f"logits {logits.shape}")
    given = selection_bias is not None
    require(given == (problem.selection_bias_dtype is not None), "moec::gate", "a selection bias is given, or missing")
    weights = torch.empty(logits.shape[0], problem.gate.top_k)
    experts = torch.empty(weights.shape, dtype=torch.int32)
    extra = () if selection_bias is None else (selection_bias.contiguous(),)
    library[symbol(problem)](rows_readable(logits), *extra, weights, experts)
    return weights, experts


def _cost(problem: GateProblem, num_tokens: int) -> Cost:
    scores = num_tokens * problem.num_experts
    return Cost(scores * DTYPE_BYTES[problem.logits_dtype], scores * (20 + 3 * problem.gate.top_k))


SPECS = vector_specs("tir-gate", "moec::gate", supports=GateProblem.refusal, cost=_cost, symbol=symbol, build=build)
