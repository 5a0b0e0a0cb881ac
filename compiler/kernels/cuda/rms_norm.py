"""moec::rms_norm and moec::add_rms_norm: one block per row, the row in registers, memory read once.

Call: kernel(x, weight, y, eps, offset) or kernel(x, residual, weight, y, total, eps, offset); no weight where the
problem has none. x [T,H] with any row stride; for [T,Q,H] call it on [T*Q,H]. Rounds where the op rounds.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.cuda.emit import (
    Expr,
    Local,
    add,
    block_reduce,
    define,
    high_half,
    load_words,
    low_half,
    pack_bf16,
    round_bf16,
    rows,
    size,
    store_words,
    tensor,
    threads_of_row,
    when,
)
from moec.compiler.kernels.norm.row import NormProblem

CHUNK = 8  # bf16 in 16 bytes: what one thread loads at a time


def refusal(problem: NormProblem) -> str | None:
    """Why the kernel does not take the problem, or None."""
    if problem.dtype != "bfloat16" or problem.weight_dtype not in ("bfloat16", None):
        return f"x in {problem.dtype} with a weight in {problem.weight_dtype}; only bfloat16 is built"
    if problem.hidden % CHUNK or not CHUNK <= problem.hidden <= 32768:
        return f"rows of {problem.hidden}, not a multiple of {CHUNK} up to 32768"
    if problem.weight_per_head:
        return "a weight per head"
    return None


def build(problem: NormProblem, with_residual: bool = False) -> Any:
    """The TIRx function."""
    hidden, threads = problem.hidden, threads_of_row(problem.hidden)
    chunks = -(-hidden // (CHUNK * threads))

    def body() -> None:
        n = size("n")
        at = rows("x", "bfloat16")
        residual = tensor("residual", (n, hidden), "bfloat16") if with_residual else None
        weight = None if problem.weight_dtype is None else tensor("weight", (hidden,), "bfloat16")
        y = tensor("y", (n, hidden), "bfloat16")
        total = tensor("total", (n, hidden), "bfloat16") if with_residual else None
        eps, offset = T.arg("eps", T.float32()), T.arg("offset", T.float32())
        T.device_entry()
        row, thread = T.cta_id([n]), T.thread_id([threads])
        words, values = Local(4 * max(1, with_residual + 1), "uint32"), Local(chunks * CHUNK)
        sums = T.alloc_buffer((threads // 32,), "float32", scope="shared")
        inside = [(c * threads + thread) * CHUNK for c in range(chunks)]
        values.fill(0)
        for c, column in enumerate(inside):
            with when(column < hidden):
                _load(words, values, c, at(row, column), residual, total, row, column)
        if problem.centre:
            mean = T.Bind(_block_sum(values, lambda v: v, sums, threads) / T.float32(hidden))
            for c, column in enumerate(inside):
                with when(column < hidden):
                    for i in range(c * CHUNK, (c + 1) * CHUNK):
                        values[i] = values[i] - mean
        squares = T.Bind(_block_sum(values, lambda v: v * v, sums, threads))
        inverse = T.Bind(T.float32(1) / T.sqrt(squares / T.float32(hidden) + eps))
        for c, column in enumerate(inside):
            with when(column < hidden):
                _store(problem, words, values, c, weight, y, inverse, offset, row, column)

    return define(body)


def _load(words: Local, values: Local, c: int, x: Expr, residual: Any, total: Any, row: Expr, column: Expr) -> None:
    """A chunk of x (plus residual, rounded, stored to total) as f32."""
    load_words(words, 0, 4, x)
    if residual is not None:
        load_words(words, 4, 4, residual.ptr_to([row, column]))
    for w in range(4):
        i = c * CHUNK + 2 * w
        values[i], values[i + 1] = low_half(words[w]), high_half(words[w])
        if residual is not None:
            words[w] = pack_bf16(values[i] + low_half(words[4 + w]), values[i + 1] + high_half(words[4 + w]))
            values[i], values[i + 1] = low_half(words[w]), high_half(words[w])
    if total is not None:
        store_words(total.ptr_to([row, column]), [words[w] for w in range(4)])


def _store(
    problem: NormProblem, words: Local, values: Local, c: int, weight: Any, y: Any, inverse: Expr, offset: Expr,
    row: Expr, column: Expr,
) -> None:  # fmt: skip
    if weight is not None:
        load_words(words, 0, 4, weight.ptr_to([column]))

    def one(i: int, w: Expr) -> Expr:
        h = values[c * CHUNK + i] * inverse
        if weight is None:
            return h
        if problem.cast == "before_weight":
            return round_bf16(w + offset) * round_bf16(h)
        return h * (w + offset)

    results = [pack_bf16(one(2 * w, low_half(words[w])), one(2 * w + 1, high_half(words[w]))) for w in range(4)]
    store_words(y.ptr_to([row, column]), results)


def _block_sum(values: Local, term: Any, shared: Any, threads: int) -> Expr:
    """The sum of term(value) over the block, in every thread."""
    total = Local(1)
    total[0] = T.float32(0)
    for i in range(values.size):
        total[0] = total[0] + term(values[i])
    block_reduce(total, add, shared, threads)
    return total[0]
