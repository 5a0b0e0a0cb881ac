"""Dot products of a few activation rows with rows of a weight that is stored as codes: in float32, or of bf16 pairs.

Codes of up to 8 bits are exact in bf16, and so are the processor's products of pairs; sums are float32 either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.linear import codes_pairs
from moec.compiler.kernels.linear.dot import token_blocks
from moec.compiler.kernels.simd import DTYPE_BYTES, Expr, Registers, Simd, Sums
from moec.passes.ir.formats import WeightFormat
from moec.passes.ir.stored import section_bytes

SCALES = {"f32": "float32", "bf16": "bfloat16"}
LINE = 64  # codes that a step of the loop over K takes: int8: a cache line of them
AHEAD_BYTES = 4096  # how far before its use a line of codes is asked for


class Dots:
    """Dot products of some tokens with some rows of the stored weight [N,K], in float32.

    x: [T,K] of a dtype. stored: the weight's bytes.
    """

    text = ""  # LLVM IR of functions that the dot products call

    def __init__(self, v: Simd, format: WeightFormat, shape: tuple[int, int], dtype: str, x: Any, stored: Any) -> None:
        self.v, self.format, self.length, self.dtype, self.x, self.stored = v, format, shape[1], dtype, x, stored
        self.row_bytes = format.row_bytes(shape[1])
        self.scales_at = section_bytes(format, *shape)[0]
        self.scale_dtype = SCALES[format.scale]
        self.groups = format.grid(*shape)[1]

    def token_blocks(self) -> tuple[int, ...]:
        """How many tokens share one read of the codes, largest first."""
        return token_blocks(self.v)

    def emit(self, tokens: Sequence[Expr], columns: Sequence[Expr]) -> list[list[Expr]]:
        """sum_k x[t,k] w[n,k] for each t of tokens and n of columns -> float32 [token][column]."""
        return (self.eight if self.format.bits == 8 else self.four)(tokens, columns)

    def scale(self, column: Expr, group: Expr) -> Expr:
        """The scale of a group of a row."""
        place = self.scales_at + (column * self.groups + group) * DTYPE_BYTES[self.scale_dtype]
        return self.v.load(self.stored[place], self.scale_dtype, 1)

    def joined(self, sums: Registers, place: Expr, parts: int) -> Expr:
        """The sum over lanes of the parts [place * parts, ..] of a sum."""
        value = sums[place * parts]
        for part in range(1, parts):
            value = value + sums[place * parts + part]
        return self.v.reduce("sum", T.Bind(value), self.v.lanes)

    def eight(self, tokens: Sequence[Expr], columns: Sequence[Expr]) -> list[list[Expr]]:
        """With a byte a code and one scale a row."""
        v, lanes, length = self.v, self.v.lanes, self.length
        parts = 2 if len(tokens) == 1 else 1  # one token: two sums per column hide the latency of an FMA
        sums, rest = Sums(len(tokens) * len(columns) * parts, lanes), Registers(len(tokens) * len(columns), 1)
        sums.fill(0.0)
        rest.fill(0.0)

        def multiply(k: Expr, part: int) -> None:
            left = [v.load(self.x[t, k], self.dtype, lanes) for t in tokens]
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
        self.rest_of_eight(tokens, columns, rest, lanes)

        return self.scaled(tokens, columns, sums, parts, rest)

    def scaled(
        self, tokens: Sequence[Expr], columns: Sequence[Expr], sums: Registers, parts: int, rest: Registers
    ) -> list[list[Expr]]:
        """(sums + rest) * the row's scale, [token][column]."""

        def total(i: int, j: int) -> Expr:
            at = i * len(columns) + j
            return T.Bind((self.joined(sums, at, parts) + rest[at]) * self.scale(columns[j], 0))

        return [[total(i, j) for j in range(len(columns))] for i in range(len(tokens))]

    def rest_of_eight(self, tokens: Sequence[Expr], columns: Sequence[Expr], rest: Registers, step: int) -> None:
        """Adds the products past the last whole step to rest [token, column], one by one."""
        v, length = self.v, self.length
        with T.serial(length % step) as r:
            k = length // step * step + r
            for j, c in enumerate(columns):
                one = v.load(self.stored[c * self.row_bytes + k], "int8", 1)
                for i, t in enumerate(tokens):
                    at = i * len(columns) + j
                    rest[at] = rest[at] + v.load(self.x[t, k], self.dtype, 1) * one

    def four(self, tokens: Sequence[Expr], columns: Sequence[Expr]) -> list[list[Expr]]:
        """With two codes a byte and a scale for each group."""
        v, lanes, group = self.v, self.v.lanes, self.format.group
        parts = max(1, 4 // (len(tokens) * len(columns)))  # several sums hide the latency of an FMA
        sums, of_group = Sums(len(tokens) * len(columns) * parts, lanes), Sums(len(tokens) * len(columns), lanes)
        sums.fill(0.0)

        def one(g: Expr, part: int) -> None:
            of_group.fill(0.0)
            for c in columns:
                v.prefetch(self.stored[c * self.row_bytes + g * (group // 2) + AHEAD_BYTES])
            self.group_of_four(tokens, columns, g, of_group)
            for j, c in enumerate(columns):
                scale = v.splat(self.scale(c, g), lanes)
                for i in range(len(tokens)):
                    place = i * len(columns) + j
                    sums[place * parts + part] = sums[place * parts + part] + of_group[place] * scale

        with T.serial(self.groups // parts) as b:
            for part in range(parts):
                one(b * parts + part, part)
        with T.serial(self.groups % parts) as b:
            one(self.groups // parts * parts + b, 0)

        return [
            [self.joined(sums, i * len(columns) + j, parts) for j in range(len(columns))] for i in range(len(tokens))
        ]

    def group_of_four(self, tokens: Sequence[Expr], columns: Sequence[Expr], g: Expr, into: Registers) -> None:
        """Adds the products of group g to `into` [token, column]."""
        v, lanes, group = self.v, self.v.lanes, self.format.group
        for at in range(0, group, 2 * lanes):
            left = [v.load_pairs(self.x[t, g * group + at], self.dtype, lanes) for t in tokens]
            for j, c in enumerate(columns):
                right = v.load_nibbles(self.stored[c * self.row_bytes + g * (group // 2) + at // 2], lanes)
                for i, values in enumerate(left):
                    place = i * len(columns) + j
                    for a, w in zip(values, right, strict=True):
                        into[place] = into[place] + a * w


class PairDots(Dots):
    """The same of bf16 activations, on a processor that adds up products of pairs of bf16."""

    text = codes_pairs.TEXT

    def token_blocks(self) -> tuple[int, ...]:
        """As many as there are registers for: a sum and the sum of a group for each."""
        return (8, 4, 2, 1)

    def eight(self, tokens: Sequence[Expr], columns: Sequence[Expr]) -> list[list[Expr]]:
        """With a byte a code and one scale a row."""
        v, lanes, pairs = self.v, self.v.lanes, codes_pairs.PAIRS
        parts = max(1, 4 // len(tokens))  # several sums hide the latency of a product
        sums, rest = Sums(len(tokens) * len(columns) * parts, lanes), Registers(len(tokens) * len(columns), 1)
        sums.fill(0.0)
        rest.fill(0.0)

        def multiply(k: Expr, part: int) -> None:
            left = [v.load_words(self.x[t, k], lanes) for t in tokens]
            for j, c in enumerate(columns):
                right = codes_pairs.of_bytes(self.stored[c * self.row_bytes + k])
                for i, value in enumerate(left):
                    at = (i * len(columns) + j) * parts + part % parts
                    sums[at] = v.dot_pairs(sums[at], value, right)

        whole = pairs * parts
        with T.serial(self.length // whole) as b:
            for c in columns:
                v.prefetch(self.stored[c * self.row_bytes + b * whole + AHEAD_BYTES])
            for part in range(parts):
                multiply(b * whole + part * pairs, part)
        with T.serial(self.length % whole // pairs) as b:
            multiply(self.length // whole * whole + b * pairs, 0)
        self.rest_of_eight(tokens, columns, rest, pairs)

        return self.scaled(tokens, columns, sums, parts, rest)

    def group_of_four(self, tokens: Sequence[Expr], columns: Sequence[Expr], g: Expr, into: Registers) -> None:
        """Adds the products of group g to `into` [token, column]."""
        v, lanes, group, pairs = self.v, self.v.lanes, self.format.group, codes_pairs.PAIRS
        for at in range(0, group, pairs):
            left = [v.load_words(self.x[t, g * group + at], lanes) for t in tokens]
            for j, c in enumerate(columns):
                right = codes_pairs.of_nibbles(self.stored[c * self.row_bytes + g * (group // 2) + at // 2])
                for i, value in enumerate(left):
                    place = i * len(columns) + j
                    into[place] = v.dot_pairs(into[place], value, right)
