"""Dot products of a few activation rows with a few weight rows: the core of every kernel that streams weights once.

Weights stay as checkpoints store them, [N,K] with K dense: a decode step is bound by memory, which row-major weights
feed as well as packed ones. Two operands in bf16 are multiplied in pairs where the processor does so at full rate; else
bf16 is widened by splitting a register of 2V values into its even and odd ones, for both operands alike, so no shuffle
is needed. Products are exact in float32 either way and sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm.tirx.script import builder as T

from moec.compiler.kernels.simd import Expr, Registers, Simd, Sums

COLUMNS = 4  # weight rows that are read side by side, where most come from a cache

At = Callable[[Expr, Expr], Expr]
"""(row, place along K) -> element of a tensor, a buffer load."""


def streams(level: str) -> int:
    """How many weight rows, each a stream from memory, are read side by side.

    Processors with AMX are Intel's, whose prefetchers follow four streams faster than one. Zen 5 reads one stream at
    the rate of its memory, four slower; with AVX2 that many sums in registers are worth more.
    """
    return 1 if level in ("avx512f", "avx512_bf16") else COLUMNS


def token_blocks(v: Simd) -> tuple[int, ...]:
    """How many tokens share one read of the weights, largest first: what fits into 32 (16) registers."""
    return (4, 2, 1) if v.lanes == 16 else (2, 1)


def for_token_blocks(sizes: tuple[int, ...], num_tokens: Expr, body: Callable[[list[Expr]], None]) -> None:
    """body(tokens) over range(num_tokens), in blocks of the sizes: powers of two, largest first, down to 1."""
    largest, *smaller = sizes
    with T.serial(num_tokens // largest) as b:
        body([b * largest + i for i in range(largest)])
    for size in smaller:
        start = num_tokens // (2 * size) * (2 * size)
        with T.If((num_tokens - start) >= size), T.Then():
            body([start + i for i in range(size)])


def emit_dots(
    v: Simd, dtypes: tuple[str, str], length: Expr, x: At, tokens: Sequence[Expr], w: At, columns: Sequence[Expr]
) -> list[list[Expr]]:
    """sum_k x[t,k] w[n,k] for each t of tokens and n of columns -> float32 [token][column]. dtypes: of x and w."""
    halves = dtypes[1] == "bfloat16"
    pairs = v.pair_products and dtypes == ("bfloat16", "bfloat16")
    parts = 2 if len(tokens) == 1 else 1  # one token: two sums per column hide the latency of an FMA
    wide, narrow = Sums(len(tokens) * len(columns) * parts, v.lanes), Registers(len(tokens) * len(columns), 1)
    wide.fill(0.0)
    narrow.fill(0.0)
    width = v.lanes * (2 if halves else 1)
    step = width * parts if pairs else width

    def read(at: At, dtype: str, row: Expr, k: Expr) -> tuple[Expr, ...]:
        if pairs:
            return tuple(v.load_words(at(row, k + part * width), v.lanes) for part in range(parts))
        return v.load_pairs(at(row, k), dtype, v.lanes) if halves else (v.load(at(row, k), dtype, v.lanes),)

    def plus(total: Expr, a: Expr, c: Expr) -> Expr:
        return v.dot_pairs(total, a, c) if pairs else total + a * c

    with T.serial(length // step) as b:
        left = [read(x, dtypes[0], t, b * step) for t in tokens]
        for j, n in enumerate(columns):
            # rows are about a page long, which is as far as the processor looks by itself
            for offset in range(0, step, width):
                v.prefetch(w(n + len(columns), b * step + offset))
            right = read(w, dtypes[1], n, b * step)
            for i, values in enumerate(left):
                for part, (a, c) in enumerate(zip(values, right, strict=True)):
                    at = (i * len(columns) + j) * parts + part % parts
                    wide[at] = plus(wide[at], a, c)
    with T.serial(length % step) as r:
        k = length // step * step + r
        for j, n in enumerate(columns):
            right_one = v.load(w(n, k), dtypes[1], 1)
            for i, t in enumerate(tokens):
                at = i * len(columns) + j
                narrow[at] = narrow[at] + v.load(x(t, k), dtypes[0], 1) * right_one

    def total(i: int, j: int) -> Expr:
        at = i * len(columns) + j
        value = wide[at * parts] if parts == 1 else wide[at * 2] + wide[at * 2 + 1]
        return T.Bind(v.reduce("sum", T.Bind(value), v.lanes) + narrow[at])

    return [[total(i, j) for j in range(len(columns))] for i in range(len(tokens))]


def emit_column_block(
    v: Simd,
    dtypes: tuple[str, str],
    sizes: tuple[Expr, Expr, Expr],
    x: At,
    w: At,
    first: Expr,
    write: Callable[[Expr, Expr, Expr], None],
    count: int = COLUMNS,
) -> None:
    """`count` weight rows from `first` on against all tokens; write(token, column, sum).

    sizes: T, N, K. Columns past N repeat the last one, which is then written several times with the same value.
    """
    num_tokens, num_columns, length = sizes
    columns = [T.Bind(T.min(first + j, num_columns - 1)) for j in range(count)]

    def block(tokens: list[Expr]) -> None:
        sums = emit_dots(v, dtypes, length, x, tokens, w, columns)
        for t, row in zip(tokens, sums, strict=True):
            for n, value in zip(columns, row, strict=True):
                write(t, n, value)

    for_token_blocks(token_blocks(v), num_tokens, block)
