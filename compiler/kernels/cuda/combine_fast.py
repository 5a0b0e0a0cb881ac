"""The end of an atomic combine: the sums that down added up (GemmProblem.reduce) become bf16 and 0 again.

Call: kernel(sums, y, n): sums f32[T,H] -> y bf16[T,H]; sums is 0 after, as the next layer's down needs it, so that no
launch clears it. It must be 0 before the first layer. Rows come in whatever order blocks end: the same inputs may give
other last bits (relative 1e-6 before rounding); `combine` has one order.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.cuda.emit import Local, define, pack_bf16, ptx, size, store_words, tensor, when

THREADS, COLUMNS = 128, 4  # columns of one thread


@dataclasses.dataclass(frozen=True)
class FinishProblem:
    """hidden: H, a multiple of 4."""

    hidden: int

    def refusal(self) -> str | None:
        """Why the kernel does not take the problem, or None."""
        return f"rows of {self.hidden}, not a multiple of {COLUMNS}" if self.hidden % COLUMNS else None


def build(problem: FinishProblem) -> Any:
    """The TIRx function."""

    def body() -> None:
        n = size("n")
        sums, y = tensor("sums", (n, problem.hidden), "float32"), tensor("y", (n, problem.hidden), "bfloat16")
        T.device_entry()
        token, block = T.cta_id([n, -(-problem.hidden // (THREADS * COLUMNS))])
        column = T.Bind((block * THREADS + T.thread_id([THREADS])) * COLUMNS)
        words = Local(COLUMNS, "uint32", "words")
        with when(column < problem.hidden):
            # not load_words: this launch writes what it reads
            ptx("ld.global.v4.b32", *[words[i] for i in range(COLUMNS)], sums.ptr_to([token, column]))
            values = [T.reinterpret("float32", words[i]) for i in range(COLUMNS)]
            store_words(y.ptr_to([token, column]), [pack_bf16(*values[:2]), pack_bf16(*values[2:])])
            store_words(sums.ptr_to([token, column]), [T.uint32(0)] * COLUMNS)

    return define(body)
