"""aten::linear over a weight that is stored as int8 or int4 codes, read as engines store it.

Call: symbol(x, stored, [bias,] y). x [T,K] any row stride, stored u8[..] as passes/ir/stored.py has it (codes row by
row, then scales), y [T,N] contiguous. The codes become numbers in registers, float32 or, for bf16 activations where the
processor multiplies pairs of bf16, those, which is exact too. Sums are float32, scaled once per row (int8) or group
(int4), rounded once after the bias: within 1e-6 of a float64 evaluation of the dequantised weight, relative to
sum |x||w|. Codes become numbers once per 4 tokens, as pairs once per 8.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moec.compiler.kernels.checks import require, rows_readable
from moec.compiler.kernels.linear.codes_dots import SCALES, Dots, PairDots
from moec.compiler.kernels.linear.dot import for_token_blocks, streams
from moec.compiler.kernels.simd import DTYPE_BYTES, Expr, Simd, for_rows, match
from moec.compiler.kernels.spec import DTYPE_TAGS, VECTOR_LEVELS, Cost, vector_specs
from moec.passes.ir.formats import WeightFormat
from moec.passes.ir.stored import stored_matrix_bytes

OP = "aten::linear"
SERIAL_PRODUCTS = 1 << 18  # products below which a second thread costs more than it saves
TASK_ROWS = 32  # rows of the weight that a task takes: a block of tokens, which the first-level cache holds, meets all
WIDEST = 16  # lanes of the widest level: int4 groups are a multiple of two such vectors


@dataclasses.dataclass(frozen=True)
class StoredLinearProblem:
    """aten::linear with a weight [out_features, in_features] in a format. dtype: of x and y."""

    in_features: int
    out_features: int
    format: WeightFormat
    dtype: str = "bfloat16"
    bias_dtype: str | None = None

    def refusal(self) -> str | None:
        """Why the kernel does not take the problem, or None."""
        for what, dtype in (("x", self.dtype), ("bias", self.bias_dtype or "float32")):
            if dtype not in DTYPE_BYTES:
                return f"{what} in {dtype}, only float32 and bfloat16 are built"
        f = self.format
        if f.kind != "int" or f.bits not in (8, 4) or not f.symmetric or f.act or f.scale not in SCALES:
            return f"{f.name}: only symmetric int8 and int4 with f32 or bf16 scales are built, activations as they are"
        if f.bits == 8 and f.block != (1, 0):
            return f"{f.name}: int8 with one scale for each row alone is built"
        if f.bits == 4 and (f.block[0] != 1 or not f.group or f.group % (2 * WIDEST) or self.in_features % f.group):
            return f"{f.name}: groups along rows of {self.in_features}, a multiple of {2 * WIDEST} each, are built"
        return None

    def pairs_refusal(self) -> str | None:
        """Why the kernel of pairs does not take the problem, or None."""
        return self.refusal() or (None if self.dtype == "bfloat16" else f"x in {self.dtype}, pairs are of bfloat16")


def symbol(problem: StoredLinearProblem) -> str:
    """The name of the problem's function in a library of kernels."""
    name = problem.format.name.replace("-", "_")
    sizes = f"{problem.out_features}x{problem.in_features}"
    return f"moec_linear_{name}_{sizes}_{DTYPE_TAGS[problem.dtype]}_{DTYPE_TAGS[problem.bias_dtype]}"


def pairs_symbol(problem: StoredLinearProblem) -> str:
    """The same of the kernel of pairs."""
    return f"{symbol(problem)}_pairs"


def build(problem: StoredLinearProblem, level: str) -> dict[str, Any]:
    """The kernel for an instruction-set level: {exported name: PrimFunc}."""
    return _build(problem, level, symbol(problem), Dots)


def build_pairs(problem: StoredLinearProblem, level: str) -> dict[str, Any]:
    """The kernel of pairs, for a level that multiplies them."""
    return _build(problem, level, pairs_symbol(problem), PairDots)


def _build(problem: StoredLinearProblem, level: str, name: str, dots_of: type[Dots]) -> dict[str, Any]:
    v, count = Simd.of(level), streams(level)
    rows, length = problem.out_features, problem.in_features
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        x = match("x", problem.dtype, (n, length), strided=1)
        stored = match("stored", "uint8", (stored_matrix_bytes(problem.format, rows, length),))
        bias = match("bias", problem.bias_dtype, (rows,)) if problem.bias_dtype else None
        y = match("y", problem.dtype, (n, rows))
        dots = dots_of(v, problem.format, (rows, length), problem.dtype, x, stored)

        def write(some: list[Expr], first: Any) -> None:
            """Results of tokens with `count` rows of the weight from `first` on."""
            places = [T.Bind(T.min(first + j, rows - 1)) for j in range(count)]
            for t, sums in zip(some, dots.emit(some, places), strict=True):
                for c, value in zip(places, sums, strict=True):
                    if bias is not None and problem.bias_dtype is not None:
                        value = value + v.load(bias[c], problem.bias_dtype, 1)
                    v.store(y[t, c], value, problem.dtype, 1)

        def task(at: Any) -> None:
            first = v.opaque(at * TASK_ROWS)
            num_steps = v.opaque((T.min(rows - first, TASK_ROWS) + count - 1) // count)

            def tokens(some: list[Expr]) -> None:
                with T.serial(num_steps) as j:
                    write(some, v.opaque(first + j * count))

            for_token_blocks(dots.token_blocks(), n, tokens)

        with v.prelude(text=dots.text):
            for_rows(T.int64(-(-rows // TASK_ROWS)), n * (rows * length) <= SERIAL_PRODUCTS, task)
    return {name: ib.get()}


def linear_codes(
    library: Any, problem: StoredLinearProblem, x: Tensor, stored: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The kernel on torch tensors: x [T,K], stored u8[..] -> [T,N]. Raises: KernelArgumentError."""
    require(problem.refusal() is None, OP, f"{problem.refusal()}")
    return _call(library[symbol(problem)], problem, x, stored, bias)


def linear_pairs(
    library: Any, problem: StoredLinearProblem, x: Tensor, stored: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The kernel of pairs, otherwise as linear_codes."""
    require(problem.pairs_refusal() is None, OP, f"{problem.pairs_refusal()}")
    return _call(library[pairs_symbol(problem)], problem, x, stored, bias)


def _call(function: Any, problem: StoredLinearProblem, x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
    size = stored_matrix_bytes(problem.format, problem.out_features, problem.in_features)
    require(x.dim() == 2 and x.shape[1] == problem.in_features, OP, f"x {tuple(x.shape)}, K {problem.in_features}")
    require(stored.shape == (size,), OP, f"the stored weight has shape {tuple(stored.shape)}, expected ({size},)")
    require((bias is None) == (problem.bias_dtype is None), OP, "a bias is given, or missing")
    y = torch.empty(x.shape[0], problem.out_features, dtype=x.dtype)
    function(rows_readable(x), stored, *(() if bias is None else (bias.contiguous(),)), y)
    return y


def _cost(problem: StoredLinearProblem, num_tokens: int) -> Cost:
    rows, columns = problem.out_features, problem.in_features
    return Cost(stored_matrix_bytes(problem.format, rows, columns), 2 * num_tokens * rows * columns)


SPECS = (
    # before the others: where both are bound by memory, the first wins
    *vector_specs(
        "tir-linear-code-pairs",
        OP,
        supports=StoredLinearProblem.pairs_refusal,
        cost=_cost,
        symbol=pairs_symbol,
        build=build_pairs,
        arithmetic="code_pairs",
        levels=("avx512_bf16",),
    ),
    *vector_specs(
        "tir-linear-codes",
        OP,
        supports=StoredLinearProblem.refusal,
        cost=_cost,
        symbol=symbol,
        build=build,
        arithmetic="codes",
        levels=(*VECTOR_LEVELS, "amx_bf16"),
    ),
)
