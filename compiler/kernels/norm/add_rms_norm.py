"""moec::add_rms_norm, [T,H]: the residual sum, rounded to the activation's dtype, and its norm, row by row in cache.

Call: symbol(x, residual, weight, y, total, eps, offset), without weight where the problem has none. total may be
residual's own memory. Tolerances as in rms_norm.py; total is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moec.compiler.kernels.checks import require, rows_readable
from moec.compiler.kernels.norm.rms_norm import SERIAL_ELEMENTS
from moec.compiler.kernels.norm.row import UNROLL, NormProblem, emit_row, refusal
from moec.compiler.kernels.simd import Simd, for_chunks, for_rows, match
from moec.compiler.kernels.spec import Cost, vector_specs


def symbol(problem: NormProblem) -> str:
    """The function's name in a library."""
    return f"moec_add_rms_norm_{problem.tag()}"


def build(problem: NormProblem, level: str) -> dict[str, Any]:
    """The kernel for an instruction-set level: {exported name: PrimFunc}."""
    v = Simd.of(level)
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(symbol(problem))
        T.func_attr({"tirx.noalias": True})
        n, h = T.int64(), T.int64()
        x = match("x", problem.dtype, (n, h), strided=1)
        residual = match("residual", problem.dtype, (n, h), strided=1)
        w = match("weight", problem.weight_dtype, (h,)) if problem.weight_dtype is not None else None
        y, total = match("y", problem.dtype, (n, h)), match("total", problem.dtype, (n, h))
        eps, offset = T.arg("eps", T.float32()), T.arg("offset", T.float32())
        weight = None if w is None else lambda k: w[k]
        with v.prelude():

            def row(r: Any) -> None:
                def add(k: Any, lanes: int, _: int) -> None:
                    both = v.load(x[r, k], problem.dtype, lanes) + v.load(residual[r, k], problem.dtype, lanes)
                    v.store(total[r, k], both, problem.dtype, lanes)

                for_chunks(h, v.lanes, UNROLL, add)
                emit_row(v, problem, h, lambda k: total[r, k], weight, lambda k: y[r, k], eps, offset)

            for_rows(n, n * h <= SERIAL_ELEMENTS, row)
    return {symbol(problem): ib.get()}


def add_rms_norm(
    library: Any,
    problem: NormProblem,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The kernel on torch tensors: x, residual [T,H] -> (normed, sum). Raises: KernelArgumentError."""
    require(_refusal(problem) is None, "moec::add_rms_norm", f"{_refusal(problem)}")
    require(x.dim() == 2 and x.shape == residual.shape, "moec::add_rms_norm", "x and residual are not both [T,H]")
    require((weight is None) == (problem.weight_dtype is None), "moec::add_rms_norm", "a weight is given, or missing")
    y, total = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    weights = () if weight is None else (weight.contiguous(),)
    library[symbol(problem)](rows_readable(x), rows_readable(residual), *weights, y, total, eps, offset)
    return y, total


def _refusal(problem: NormProblem) -> str | None:
    return "x is [T,Q,H], only [T,H] is built" if problem.heads else refusal(problem)


def _cost(problem: NormProblem, num_tokens: int) -> Cost:
    elements = num_tokens * problem.hidden
    return Cost(elements * 4 * (4 if problem.dtype == "float32" else 2), elements * 6)


SPECS = vector_specs(
    "tir-add-rms-norm", "moec::add_rms_norm", supports=_refusal, cost=_cost, symbol=symbol, build=build
)
