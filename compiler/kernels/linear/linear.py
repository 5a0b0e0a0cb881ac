"""aten::linear for one or few tokens: y = x W^T + b from row-major weights, each weight read once per 4 tokens.

Call: symbol(x, w, [bias,] y). x [T,K] any row stride, w [N,K], y [T,N] contiguous; T, N and K are found at run time, so
one kernel serves every shape of its dtypes. Sums are float32, rounded once after the bias. float32: within 1e-6 of a
float64 evaluation, relative to sum |x||w|.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moec.compiler.kernels.checks import require, rows_readable
from moec.compiler.kernels.linear.dot import COLUMNS, emit_column_block, streams
from moec.compiler.kernels.simd import DTYPE_BYTES, Simd, for_rows, match
from moec.compiler.kernels.spec import DTYPE_TAGS, VECTOR_LEVELS, Cost, vector_specs
from moec.compiler.kernels.template.flow import when

FEW_TOKENS = 4  # that the rows of x stay in the first-level cache for; more must meet several columns at a time
SERIAL_PRODUCTS = 1 << 18  # products below which a second thread costs more than it saves


@dataclasses.dataclass(frozen=True)
class LinearProblem:
    """aten::linear; the sizes are for the cost model alone.

    dtype: of x and y.  weight_dtype: of w.  bias_dtype: None without a bias.  out_dtype: None: dtype.
    """

    in_features: int
    out_features: int
    dtype: str = "bfloat16"
    weight_dtype: str = "bfloat16"
    bias_dtype: str | None = None
    out_dtype: str | None = None

    @property
    def result_dtype(self) -> str:
        """The dtype of y."""
        return self.out_dtype or self.dtype

    def refusal(self) -> str | None:
        """Why the kernel does not take the problem, or None."""
        named = {"x": self.dtype, "w": self.weight_dtype, "bias": self.bias_dtype or "float32", "y": self.result_dtype}
        for what, dtype in named.items():
            if dtype not in DTYPE_BYTES:
                return f"{what} in {dtype}, only float32 and bfloat16 are built"
        return None


def symbol(problem: LinearProblem) -> str:
    """The name of the problem's function in a library of kernels."""
    dtypes = (problem.dtype, problem.weight_dtype, problem.bias_dtype, problem.result_dtype)
    return "moec_linear_" + "_".join(DTYPE_TAGS[d] for d in dtypes)


def build(problem: LinearProblem, level: str) -> dict[str, Any]:
    """The kernel for an instruction-set level: {exported name: PrimFunc}."""
    v = Simd.of(level)
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(symbol(problem))
        T.func_attr({"tirx.noalias": True})
        n, num_columns, length = T.int64(), T.int64(), T.int64()
        x = match("x", problem.dtype, (n, length), strided=1)
        w = match("w", problem.weight_dtype, (num_columns, length))
        bias = match("bias", problem.bias_dtype, (num_columns,)) if problem.bias_dtype else None
        y = match("y", problem.result_dtype, (n, num_columns))

        def write(t: Any, c: Any, value: Any) -> None:
            if bias is not None and problem.bias_dtype is not None:
                value = value + v.load(bias[c], problem.bias_dtype, 1)
            v.store(y[t, c], value, problem.result_dtype, 1)

        def columns(block: Any, count: int) -> None:
            emit_column_block(
                v,
                (problem.dtype, problem.weight_dtype),
                (n, num_columns, length),
                lambda t, k: x[t, k],
                lambda c, k: w[c, k],
                block * count,
                write,
                count,
            )

        with v.prelude():
            small = n * num_columns * length <= SERIAL_PRODUCTS

            def blocks_of(count: int) -> None:
                for_rows((num_columns + count - 1) // count, small, lambda block: columns(block, count))

            few = streams(level)
            if few == COLUMNS:
                blocks_of(COLUMNS)
            else:
                when(n <= FEW_TOKENS, lambda: blocks_of(few), lambda: blocks_of(COLUMNS))
    return {symbol(problem): ib.get()}


def linear(library: Any, problem: LinearProblem, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """The kernel on torch tensors: x [T,K], w [N,K] -> [T,N]. Raises: KernelArgumentError."""
    op = "aten::linear"
    require(problem.refusal() is None, op, f"{problem.refusal()}")
    require(x.dim() == 2 and w.dim() == 2 and x.shape[1] == w.shape[1], op, f"x {tuple(x.shape)}, w {tuple(w.shape)}")
    require((bias is None) == (problem.bias_dtype is None), op, "a bias is given, or missing")
    y = torch.empty(x.shape[0], w.shape[0], dtype=getattr(torch, problem.result_dtype))
    extra = () if bias is None else (bias.contiguous(),)
    library[symbol(problem)](rows_readable(x), w.contiguous(), *extra, y)
    return y


def _cost(problem: LinearProblem, num_tokens: int) -> Cost:
    products = problem.in_features * problem.out_features
    return Cost(products * DTYPE_BYTES[problem.weight_dtype], 2 * num_tokens * products)


SPECS = vector_specs(
    "tir-linear",
    "aten::linear",
    supports=LinearProblem.refusal,
    cost=_cost,
    symbol=symbol,
    build=build,
    levels=(*VECTOR_LEVELS, "amx_bf16"),
)
