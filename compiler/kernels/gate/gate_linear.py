"""moec::gate_linear: the router's GEMM and the gate in one function.

Call: symbol(x, w, [bias,] [selection_bias,] logits, weights, experts). x [T,H] any row stride, w [E,H] as checkpoints
have it, logits f32[T,E] scratch. Sums are float32; logits are rounded where router_dtype is bfloat16, as F.linear
rounds them, so a tie there may fall the other way when another order of summation tips a rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moec.compiler.kernels.checks import require, rows_readable
from moec.compiler.kernels.gate.gate import emit_tokens
from moec.compiler.kernels.gate.problem import GateProblem
from moec.compiler.kernels.linear.dot import COLUMNS, emit_column_block
from moec.compiler.kernels.simd import DTYPE_BYTES, Simd, for_rows, match
from moec.compiler.kernels.spec import Cost, vector_specs

SERIAL_PRODUCTS = 1 << 18  # products below which a second thread costs more than it saves
TASK_TOKENS = 64  # most tokens of a task: all blocks of the router's columns pass while the second-level cache has them


def symbol(problem: GateProblem) -> str:
    """The function's name in a library."""
    return f"moec_gate_linear_{problem.tag()}"


def build(problem: GateProblem, level: str) -> dict[str, Any]:
    """The kernel for an instruction-set level: {exported name: PrimFunc}."""
    v, num_experts, top_k = Simd.of(level).exact(), problem.num_experts, problem.gate.top_k
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(symbol(problem))
        T.func_attr({"tirx.noalias": True})
        n, h = T.int64(), T.int64()
        x = match("x", problem.x_dtype, (n, h), strided=1)
        w = match("w", problem.weight_dtype, (num_experts, h))
        bias = match("bias", problem.bias_dtype, (num_experts,)) if problem.bias_dtype else None
        chosen_by = problem.selection_bias_dtype
        selection_bias = match("selection_bias", chosen_by, (num_experts,)) if chosen_by else None
        logits = match("logits", "float32", (n, num_experts))
        weights, experts = match("weights", "float32", (n, top_k)), match("experts", "int32", (n, top_k))

        def write(t: Any, e: Any, value: Any) -> None:
            if bias is not None and problem.bias_dtype is not None:
                value = value + v.load(bias[e], problem.bias_dtype, 1)
            v.store(logits[t, e], v.rounded(value, problem.logits_dtype, 1), "float32", 1)

        num_blocks = -(-num_experts // COLUMNS)

        def task(number: Any, size: Any) -> None:
            first = v.opaque(T.floordiv(number, num_blocks) * size)
            emit_column_block(
                v,
                (problem.x_dtype, problem.weight_dtype),
                (v.opaque(T.min(n - first, size)), num_experts, h),
                lambda t, k: x[first + t, k],
                lambda e, k: w[e, k],
                T.floormod(number, num_blocks) * COLUMNS,
                lambda t, e, value: write(first + t, e, value),
            )

        with v.prelude():
            # parts of equal size: one of 64 tokens and one of a few would be a single thread's work
            parts = v.opaque(T.max(T.floordiv(n + (TASK_TOKENS - 1), TASK_TOKENS), 1))
            size = v.opaque(T.floordiv(T.floordiv(n + parts - 1, parts) + 3, 4) * 4)
            for_rows(parts * num_blocks, n * num_experts * h <= SERIAL_PRODUCTS, lambda number: task(number, size))
            plain = dataclasses.replace(problem, logits_dtype="float32")
            emit_tokens(v, _with_dtypes(problem, plain), n, logits, selection_bias, weights, experts)
    return {symbol(problem): ib.get()}


def _with_dtypes(problem: GateProblem, plain: GateProblem) -> GateProblem:
    """The gate on float32 scratch logits that still rounds where the problem's dtypes say."""
    spec = dataclasses.replace(problem.gate, compute_dtype=problem.compute_dtype, weights_dtype=problem.result_dtype)
    return dataclasses.replace(plain, spec=spec.encode())


def gate_linear(
    library: Any,
    problem: GateProblem,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    selection_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel on torch tensors: x [T,H], w [E,H] -> weights f32[T,K], experts i32[T,K].

    Raises: KernelArgumentError.
    """
    op = "moec::gate_linear"
    require(problem.refusal() is None, op, f"{problem.refusal()}")
    require(x.dim() == 2 and w.shape == (problem.num_experts, x.shape[1]), op, f"x {x.shape}, w {w.shape}")
    for name, tensor, dtype in (
        ("bias", bias, problem.bias_dtype),
        ("selection bias", selection_bias, problem.selection_bias_dtype),
    ):
        require((tensor is None) == (dtype is None), op, f"a {name} is given, or missing")
    logits = torch.empty(x.shape[0], problem.num_experts)
    weights = torch.empty(x.shape[0], problem.gate.top_k)
    experts = torch.empty(weights.shape, dtype=torch.int32)
    extra = tuple(b.contiguous() for b in (bias, selection_bias) if b is not None)
    library[symbol(problem)](rows_readable(x), w.contiguous(), *extra, logits, weights, experts)
    return weights, experts


def workspace_bytes(problem: GateProblem, num_tokens: int) -> int:
    """The logits f32[T,E]."""
    return num_tokens * problem.num_experts * 4


def _refusal(problem: GateProblem) -> str | None:
    return problem.refusal() if problem.hidden else "logits are given, no router to run"


def _cost(problem: GateProblem, num_tokens: int) -> Cost:
    products = problem.num_experts * problem.hidden
    scores = num_tokens * problem.num_experts
    num_flops = 2 * num_tokens * products + scores * (20 + 3 * problem.gate.top_k)
    return Cost(products * DTYPE_BYTES[problem.weight_dtype], num_flops)


SPECS = vector_specs(
    "tir-gate-linear",
    "moec::gate_linear",
    supports=_refusal,
    cost=_cost,
    symbol=symbol,
    build=build,
    workspace_bytes=workspace_bytes,
)
