"""The weighted sum of a token's expert rows, in one fixed order: what moec::combine_gemm does after its GEMM.

Call: kernel(part, weights, experts, [shared_weight,] y): part [splits*S, H] by slot id, weights f32[T,K], experts
i32[T,K], shared_weight f32[T] -> y bf16[T,H]; no weights where rows were weighted before the experts. Slots whose
expert is not held here (index >= E) have no row and add 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.cuda.emit import (
    Expr,
    Local,
    define,
    high_half,
    load_words,
    low_half,
    pack_bf16,
    size,
    store_words,
    tensor,
    when,
)

THREADS, COLUMNS = 128, 4  # columns of one thread


@dataclasses.dataclass(frozen=True)
class CombineProblem:
    """hidden: H, a multiple of 4. num_experts: routed. has_shared_weight: else shared experts weigh 1.
    weighted: False where weights met the experts' input (weight_on_input).
    """

    hidden: int
    num_experts: int
    top_k: int
    num_shared: int = 0
    splits: int = 1
    part_dtype: str = "float32"
    has_shared_weight: bool = False
    weighted: bool = True

    def refusal(self) -> str | None:
        """Why the kernel does not take the problem, or None."""
        return f"rows of {self.hidden}, not a multiple of {COLUMNS}" if self.hidden % COLUMNS else None


def build(problem: CombineProblem) -> Any:
    """The TIRx function."""
    slots_per_token = problem.top_k + problem.num_shared

    def body() -> None:
        n = size("n")
        part = tensor("part", (n * (slots_per_token * problem.splits), problem.hidden), problem.part_dtype)
        weights = tensor("weights", (n, problem.top_k), "float32") if problem.weighted else None
        experts = tensor("experts", (n, problem.top_k), "int32")
        shared_weight = tensor("shared_weight", (n,), "float32") if problem.has_shared_weight else None
        y = tensor("y", (n, problem.hidden), "bfloat16")
        T.device_entry()
        token, block = T.cta_id([n, -(-problem.hidden // (THREADS * COLUMNS))])
        column = T.Bind((block * THREADS + T.thread_id([THREADS])) * COLUMNS)
        sums, words = Local(COLUMNS, name="sums"), Local(COLUMNS, "uint32", "words")
        row_values = Local(COLUMNS, name="row_values")
        with when(column < problem.hidden):
            sums.fill(0)

            def add_slot(k: Expr, weight: Expr) -> None:
                row_values.fill(0)
                for s in range(problem.splits):
                    row = T.Cast("int64", n) * (s * slots_per_token) + T.Cast("int64", token) * slots_per_token + k
                    _add(problem, words, row_values, part.ptr_to([row, column]))
                for i in range(COLUMNS):
                    sums[i] = sums[i] + weight * row_values[i]

            with T.serial(problem.top_k) as k:
                expert = T.Bind(experts[token, k])
                with when(T.And(expert >= 0, expert < problem.num_experts)):
                    add_slot(k, T.float32(1) if weights is None else T.Bind(weights[token, k]))
            for k in range(problem.top_k, slots_per_token):
                add_slot(k, T.float32(1) if shared_weight is None else T.Bind(shared_weight[token]))
            store_words(y.ptr_to([token, column]), [pack_bf16(sums[0], sums[1]), pack_bf16(sums[2], sums[3])])

    return define(body)


def _add(problem: CombineProblem, words: Local, values: Local, pointer: Expr) -> None:
    """Adds the thread's columns of one row of part to values."""
    if problem.part_dtype == "float32":
        load_words(words, 0, 4, pointer)
        for i in range(COLUMNS):
            values[i] = values[i] + T.reinterpret("float32", words[i])
    else:
        load_words(words, 0, 2, pointer)
        for i in range(COLUMNS):
            values[i] = values[i] + (high_half(words[i // 2]) if i % 2 else low_half(words[i // 2]))
