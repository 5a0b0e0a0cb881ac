"""moec::rms_norm for any width, [T,H] or [T,Q,H], rows in parallel.

Call: symbol(x, weight, y, eps, offset), without weight where the problem has none. x may have any stride on all axes
but the last; y is contiguous. float32: within 2e-6 of a float64 evaluation, relative to the largest entry of a row.
bfloat16: rounds where the op rounds; differs from it by one bf16 step where a sum in another order tips a rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moec.compiler.kernels.checks import require, rows_readable
from moec.compiler.kernels.norm.row import NormProblem, emit_row, refusal
from moec.compiler.kernels.simd import Simd, for_rows, match
from moec.compiler.kernels.spec import Cost, vector_specs

SERIAL_ELEMENTS = 32768  # below this a second thread costs more than it saves


def symbol(problem: NormProblem) -> str:
    """The function's name in a library."""
    return f"moec_rms_norm_{problem.tag()}"


def build(problem: NormProblem, level: str) -> dict[str, Any]:
    """The kernel for an instruction-set level: {exported name: PrimFunc}."""
    v = Simd.of(level)
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(symbol(problem))
        T.func_attr({"tirx.noalias": True})
        n, q, h = T.int64(), T.int64() if problem.heads else 1, T.int64()
        inner = (q, h) if problem.heads else (h,)
        x = match("x", problem.dtype, (n, *inner), strided=len(inner))
        w_dtype, w_shape = problem.weight_dtype, (q, h) if problem.weight_per_head else (h,)
        w = None if w_dtype is None else match("weight", w_dtype, w_shape)
        y = match("y", problem.dtype, (n, *inner))
        eps, offset = T.arg("eps", T.float32()), T.arg("offset", T.float32())
        with v.prelude():

            def row(r: Any) -> None:
                at = [r // q, r % q] if problem.heads else [r]
                weight = None
                if w is not None:
                    weight = lambda k: w[at[1], k] if problem.weight_per_head else w[k]  # noqa: E731
                emit_row(v, problem, h, lambda k: x[(*at, k)], weight, lambda k: y[(*at, k)], eps, offset)

            for_rows(n * q, n * q * h <= SERIAL_ELEMENTS, row)
    return {symbol(problem): ib.get()}


def rms_norm(
    library: Any, problem: NormProblem, x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0
) -> Tensor:
    """The kernel on torch tensors: x [T,H] or [T,Q,H] -> the same shape. Raises: KernelArgumentError."""
    require(refusal(problem) is None, "moec::rms_norm", f"{refusal(problem)}")
    require(x.dim() == (3 if problem.heads else 2), "moec::rms_norm", f"x has {x.dim()} axes")
    require((weight is None) == (problem.weight_dtype is None), "moec::rms_norm", "a weight is given, or missing")
    y = torch.empty(x.shape, dtype=x.dtype)
    weights = () if weight is None else (weight.contiguous(),)
    library[symbol(problem)](rows_readable(x), *weights, y, eps, offset)
    return y


def _cost(problem: NormProblem, num_tokens: int) -> Cost:
    elements = num_tokens * problem.num_heads * problem.hidden
    return Cost(elements * 2 * (4 if problem.dtype == "float32" else 2), elements * 5)


SPECS = vector_specs("tir-rms-norm", "moec::rms_norm", supports=refusal, cost=_cost, symbol=symbol, build=build)
