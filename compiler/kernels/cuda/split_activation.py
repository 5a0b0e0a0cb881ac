"""The activation after a gate_up GEMM with split K: sums of the splits in one order, bias, activation, rounded once.

Call: kernel(part, [bias, expert_start,] h, slots): part f32[splits*S, 2F] in slot_order, as gate_up_part
writes it -> h bf16[S,F]. A split GEMM is for grids that would not fill the GPU: its sums take 8 F bytes per slot and
split, little beside the weights while slots are few. Rows of slots held elsewhere are open, as part's are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.cuda.activation import activate
from moec.compiler.kernels.cuda.emit import Expr, Local, define, load_words, pack_bf16, size, store_words, tensor, when
from moec.passes.ir.activation import Activation

THREADS, COLUMNS = 128, 4  # columns of one thread


@dataclasses.dataclass(frozen=True)
class SplitActivationProblem:
    """inner: F, a multiple of 4. act: see Activation. num_experts: stacked ones, where has_bias: f32[E, 2F]."""

    inner: int
    splits: int
    act: str = "silu"
    num_experts: int = 0
    has_bias: bool = False

    @property
    def halves(self) -> int:
        """2 with a gate, else 1."""
        return 2 if Activation.parse(self.act).gated else 1

    def refusal(self) -> str | None:
        """Why the kernel does not take the problem, or None."""
        return f"rows of {self.inner}, not a multiple of {COLUMNS}" if self.inner % COLUMNS else None


def build(problem: SplitActivationProblem) -> Any:
    """The TIRx function."""
    width = problem.inner * problem.halves

    def body() -> None:
        slots = size("slots")
        part = tensor("part", (slots * problem.splits, width), "float32")
        bias = expert_start = None
        if problem.has_bias:
            bias = tensor("bias", (problem.num_experts, width), "float32")
            expert_start = tensor("expert_start", (problem.num_experts + 1,), "int32")
        h = tensor("h", (slots, problem.inner), "bfloat16")
        T.device_entry()
        row, block = T.cta_id([slots, -(-problem.inner // (THREADS * COLUMNS))])
        column = T.Bind((block * THREADS + T.thread_id([THREADS])) * COLUMNS)
        sums, words = Local(COLUMNS * problem.halves, name="sums"), Local(COLUMNS, "uint32", "words")
        expert = Local(1, "int32", "expert")
        expert.fill(0)
        if expert_start is not None:
            _find_expert(expert, expert_start, problem.num_experts, row)
        with when(column < problem.inner):
            for half in range(problem.halves):
                at, own = half * problem.inner + column, half * COLUMNS
                for i in range(COLUMNS):
                    sums[own + i] = T.float32(0)
                for s in range(problem.splits):
                    source = T.Cast("int64", slots) * s + T.Cast("int64", row)
                    load_words(words, 0, COLUMNS, part.ptr_to([source, at]))
                    for i in range(COLUMNS):
                        sums[own + i] = sums[own + i] + T.reinterpret("float32", words[i])
                if bias is not None:
                    for i in range(COLUMNS):
                        sums[own + i] = sums[own + i] + bias[expert[0], at + i]
            made = [_activated(problem, sums, i) for i in range(COLUMNS)]
            store_words(h.ptr_to([row, column]), [pack_bf16(made[0], made[1]), pack_bf16(made[2], made[3])])

    return define(body)


def _find_expert(expert: Local, expert_start: Any, num_experts: int, row: Expr) -> None:
    """The last expert that starts at or before the row (for a row behind all experts: the last one)."""
    with T.serial(num_experts) as e, when(expert_start[e] <= row):
        expert[0] = e


def _activated(problem: SplitActivationProblem, sums: Local, i: int) -> Expr:
    up = sums[COLUMNS + i] if problem.halves == 2 else None
    return T.Bind(activate(Activation.parse(problem.act), sums[i], up))
