"""aten::linear for one or few tokens over a weight that is stored as int8 or int4 codes, read as engines store it.

Call: symbol(x, stored, [bias,] y). x [T,K] any row stride, stored u8[..] as passes/ir/stored.py has it (codes row by
row, then scales), y [T,N] contiguous. The codes become float32 numbers in registers; products and sums are float32,
scaled once per row (int8) or group (int4), rounded once after the bias: within 1e-6 of a float64 evaluation of the
dequantised weight, relative to sum |x||w|. Every code is read once per 4 tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moec.compiler.kernels.checks import require, rows_readable
from moec.compiler.kernels.linear.dot import for_token_blocks, streams
from moec.compiler.kernels.simd import DTYPE_BYTES, Expr, Registers, Simd, for_rows, match
from moec.compiler.kernels.spec import DTYPE_TAGS, VECTOR_LEVELS, Cost, vector_specs
from moec.passes.ir.formats import WeightFormat
from moec.passes.ir.stored import section_bytes, stored_matrix_bytes

SERIAL_PRODUCTS = 1 << 18  # products below which a second thread costs more than it saves
SCALES = {"f32": "float32", "bf16": "bfloat16"}
LINE = 64  # codes that a step of the loop over K takes: int8: a cache line of them
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


def symbol(problem: StoredLinearProblem) -> str:
    """The name of the problem's function in a library of kernels."""
    name = problem.format.name.replace("-", "_")
    sizes = f"{problem.out_features}x{problem.in_features}"
    return f"moec_linear_{name}_{sizes}_{DTYPE_TAGS[problem.dtype]}_{DTYPE_TAGS[problem.bias_dtype]}"


def build(problem: StoredLinearProblem, level: str) -> dict[str, Any]:
    """The kernel for an instruction-set level: {exported name: PrimFunc}."""
    v, count = Simd.of(level), streams(level)
    rows, length = problem.out_features, problem.in_features
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(symbol(problem))
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        x = match("x", problem.dtype, (n, length), strided=1)
        stored = match("stored", "uint8", (stored_matrix_bytes(problem.format, rows, length),))
        bias = match("bias", problem.bias_dtype, (rows,)) if problem.bias_dtype else None
        y = match("y", problem.dtype, (n, rows))
        dots = _Dots(v, problem, x, stored)

        def columns(block: Any) -> None:
            places = [T.Bind(T.min(block * count + j, rows - 1)) for j in range(count)]

            def tokens(some: list[Expr]) -> None:
                for t, sums in zip(some, dots.emit(some, places), strict=True):
                    for c, value in zip(places, sums, strict=True):
                        if bias is not None and problem.bias_dtype is not None:
                            value = value + v.load(bias[c], problem.bias_dtype, 1)
                        v.store(y[t, c], value, problem.dtype, 1)

            for_token_blocks(v, n, tokens)

        with v.prelude():
            for_rows((rows + count - 1) // count, n * (rows * length) <= SERIAL_PRODUCTS, columns)
    return {symbol(problem): ib.get()}


class _Dots:
    """Dot products of some tokens with some rows of the stored weight."""

    def __init__(self, v: Simd, problem: StoredLinearProblem, x: Any, stored: Any) -> None:
        self.v, self.problem, self.x, self.stored = v, problem, x, stored
        format, length = problem.format, problem.in_features
        self.row_bytes = format.row_bytes(length)
        self.scales_at = section_bytes(format, problem.out_features, length)[0]
        self.scale_dtype = SCALES[format.scale]
        self.groups = format.grid(problem.out_features, length)[1]

    def emit(self, tokens: Sequence[Expr], columns: Sequence[Expr]) -> list[list[Expr]]:
        """sum_k x[t,k] w[n,k] for each t of tokens and n of columns -> float32 [token][column]."""
        eight = self.problem.format.bits == 8
        return (self._eight if eight else self._four)(tokens, columns)

    def _scale(self, column: Expr, group: Expr) -> Expr:
        place = self.scales_at + (column * self.groups + group) * DTYPE_BYTES[self.scale_dtype]
        return self.v.load(self.stored[place], self.scale_dtype, 1)

    def _eight(self, tokens: Sequence[Expr], columns: Sequence[Expr]) -> list[list[Expr]]:
        v, lanes, length = self.v, self.v.lanes, self.problem.in_features
        parts = 2 if len(tokens) == 1 else 1  # one token: two sums per column hide the latency of an FMA
        sums, rest = Registers(len(tokens) * len(columns) * parts, lanes), Registers(len(tokens) * len(columns), 1)
        sums.fill(0.0)
        rest.fill(0.0)

        def multiply(k: Expr, part: int) -> None:
            left = [v.load(self.x[t, k], self.problem.dtype, lanes) for t in tokens]
            for j, c in enumerate(columns):
                right = v.load(self.stored[c * self.row_bytes + k], "int8", lanes)
                for i, value in enumerate(left):
                    at = (i * len(columns) + j) * parts + part % parts
                    sums[at] = sums[at] + value * right

        with T.serial(length // LINE) as b:
            for c in columns:
                v.prefetch(self.stored[(c + len(columns)) * self.row_bytes + b * LINE])
            for part, at in enumerate(range(0, LINE, lanes)):
                multiply(b * LINE + at, part)
        with T.serial(length % LINE // lanes) as b:
            multiply(length // LINE * LINE + b * lanes, 0)
        with T.serial(length % lanes) as r:
            k = length // lanes * lanes + r
            for j, c in enumerate(columns):
                one = v.load(self.stored[c * self.row_bytes + k], "int8", 1)
                for i, t in enumerate(tokens):
                    at = i * len(columns) + j
                    rest[at] = rest[at] + v.load(self.x[t, k], self.problem.dtype, 1) * one

        def total(i: int, j: int) -> Expr:
            at = i * len(columns) + j
            value = sums[at] if parts == 1 else sums[at * 2] + sums[at * 2 + 1]
            whole = T.Bind(v.reduce("sum", T.Bind(value), lanes) + rest[at])
            return T.Bind(whole * self._scale(columns[j], 0))

        return [[total(i, j) for j in range(len(columns))] for i in range(len(tokens))]

    def _four(self, tokens: Sequence[Expr], columns: Sequence[Expr]) -> list[list[Expr]]:
        v, lanes, group = self.v, self.v.lanes, self.problem.format.group
        sums, of_group = (Registers(len(tokens) * len(columns), lanes) for _ in range(2))
        sums.fill(0.0)
        with T.serial(self.groups) as g:
            of_group.fill(0.0)
            for c in columns:
                v.prefetch(self.stored[(c + len(columns)) * self.row_bytes + g * (group // 2)])
            for at in range(0, group, 2 * lanes):
                left = [v.load_pairs(self.x[t, g * group + at], self.problem.dtype, lanes) for t in tokens]
                for j, c in enumerate(columns):
                    right = v.load_nibbles(self.stored[c * self.row_bytes + g * (group // 2) + at // 2], lanes)
                    for i, values in enumerate(left):
                        place = i * len(columns) + j
                        for a, w in zip(values, right, strict=True):
                            of_group[place] = of_group[place] + a * w
            for j, c in enumerate(columns):
                scale = v.splat(self._scale(c, g), lanes)
                for i in range(len(tokens)):
                    place = i * len(columns) + j
                    sums[place] = sums[place] + of_group[place] * scale
        return [
            [v.reduce("sum", T.Bind(sums[i * len(columns) + j]), lanes) for j in range(len(columns))]
            for i in range(len(tokens))
        ]


def linear_codes(
    library: Any, problem: StoredLinearProblem, x: Tensor, stored: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The kernel on torch tensors: x [T,K], stored u8[..] -> [T,N]. Raises: KernelArgumentError."""
    op = "aten::linear"
    require(problem.refusal() is None, op, f"{problem.refusal()}")
    size = stored_matrix_bytes(problem.format, problem.out_features, problem.in_features)
    require(x.dim() == 2 and x.shape[1] == problem.in_features, op, f"x {tuple(x.shape)}, K {problem.in_features}")
    require(stored.shape == (size,), op, f"the stored weight has shape {tuple(stored.shape)}, expected ({size},)")
    require((bias is None) == (problem.bias_dtype is None), op, "a bias is given, or missing")
    y = torch.empty(x.shape[0], problem.out_features, dtype=x.dtype)
    library[symbol(problem)](rows_readable(x), stored, *(() if bias is None else (bias.contiguous(),)), y)
    return y


def _cost(problem: StoredLinearProblem, num_tokens: int) -> Cost:
    rows, columns = problem.out_features, problem.in_features
    return Cost(stored_matrix_bytes(problem.format, rows, columns), 2 * num_tokens * rows * columns)


SPECS = vector_specs(
    "tir-linear-codes",
    "aten::linear",
    supports=StoredLinearProblem.refusal,
    cost=_cost,
    symbol=symbol,
    build=build,
    arithmetic="codes",
    levels=(*VECTOR_LEVELS, "amx_bf16"),
)
