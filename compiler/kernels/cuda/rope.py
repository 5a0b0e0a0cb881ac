"""moec::rope for bfloat16: one thread per pair of columns, or per column that stays.

Call: kernel(x, x_stride, cos, sin, y): x [T,Q*D] with any row stride, cos and sin f32[T, rotary_dim/2] -> y [T,Q,D].
Rounds where the op rounds: compute_dtype "input" rounds cos, sin, each product and the sum to bfloat16.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.cuda.emit import Expr, define, round_bf16, rows, size, tensor, when

THREADS = 128
PAIRINGS = ("half", "interleaved", "deinterleaved")


@dataclasses.dataclass(frozen=True)
class RopeProblem:
    """heads Q, width D, rotary_dim R <= D; pairing and compute_dtype as in the op."""

    heads: int
    width: int
    rotary_dim: int
    pairing: str = "half"
    compute_dtype: str = "input"

    def refusal(self) -> str | None:
        """Why the kernel does not take the problem, or None."""
        if self.pairing not in PAIRINGS or self.compute_dtype not in ("input", "float32"):
            return f"pairing {self.pairing!r} computed in {self.compute_dtype!r}"
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.width:
            return f"a rotation of {self.rotary_dim} of {self.width} columns"
        return None


def build(problem: RopeProblem) -> Any:
    """The TIRx function."""
    half, kept = problem.rotary_dim // 2, problem.width - problem.rotary_dim
    units = half + kept  # of a head: its pairs, then the columns that stay

    def body() -> None:
        n = size("n")
        at = rows("x", "bfloat16", value=True)
        cos, sin = tensor("cos", (n, half), "float32"), tensor("sin", (n, half), "float32")
        y = tensor("y", (n, problem.heads, problem.width), "bfloat16")
        T.device_entry()
        token, block = T.cta_id([n, -(-problem.heads * units // THREADS)])
        unit = T.Bind(block * THREADS + T.thread_id([THREADS]))
        with when(unit < problem.heads * units):
            head, i = T.Bind(unit // units), T.Bind(unit % units)

            def load(column: Expr) -> Expr:
                return T.Cast("float32", at(token, head * problem.width + column))

            def store(column: Expr, value: Expr) -> None:
                T.buffer_store(y, T.Cast("bfloat16", value), [token, head, column])

            with T.If(i < half):
                with T.Then():
                    _turn(problem, load, store, cos[token, i], sin[token, i], i)
                with T.Else():
                    column = T.Bind(i - half + problem.rotary_dim)
                    store(column, load(column))

    return define(body)


def _turn(problem: RopeProblem, load: Any, store: Any, cos: Expr, sin: Expr, i: Expr) -> None:
    """One pair: a*c - b*s and b*c + a*s."""
    half = problem.rotary_dim // 2
    first, second = (i, i + half) if problem.pairing == "half" else (2 * i, 2 * i + 1)
    to = (i, i + half) if problem.pairing == "deinterleaved" else (first, second)
    rounded = round_bf16 if problem.compute_dtype == "input" else lambda v: v
    c, s = T.Bind(rounded(cos)), T.Bind(rounded(sin))
    a, b = T.Bind(load(first)), T.Bind(load(second))
    results = [rounded(a * c) - rounded(b * s), rounded(b * c) + rounded(a * s)]
    for column, value in zip(to, [T.Bind(r) for r in results], strict=True):
        store(column, value)
