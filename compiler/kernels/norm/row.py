"""What both norm kernels share: the problem, and the code that normalises one row in cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tvm.tirx.script import builder as T

from moec.compiler.kernels.simd import Expr, Registers, Simd, for_chunks, lanes_of
from moec.compiler.kernels.spec import DTYPE_TAGS

UNROLL = 4  # accumulators per row: enough to hide the latency of an FMA


@dataclasses.dataclass(frozen=True)
class NormProblem:
    """moec::rms_norm and moec::add_rms_norm of any width; eps and offset are arguments of the call.

    dtype: of x and y.  weight_dtype: None without a weight.  heads: x is [T,Q,H] (QK norm), else [T,H].
    weight_per_head: weight [Q,H], else [H].  cast, centre: as in the op.
    hidden, num_heads: sizes for the cost model; the code takes any.
    """

    hidden: int
    dtype: str = "bfloat16"
    weight_dtype: str | None = "bfloat16"
    cast: str = "before_weight"
    centre: bool = False
    heads: bool = False
    weight_per_head: bool = False
    num_heads: int = 1

    def tag(self) -> str:
        """What tells the code of two problems apart, as part of a symbol."""
        parts = [DTYPE_TAGS[self.dtype], DTYPE_TAGS[self.weight_dtype], self.cast.split("_")[0]]
        flags = (("centre", self.centre), ("heads", self.heads), ("perhead", self.weight_per_head))
        return "_".join(parts + [name for name, on in flags if on])


def refusal(problem: NormProblem) -> str | None:
    """Why the norm kernels do not take the problem, or None."""
    for what, dtype in (("x", problem.dtype), ("weight", problem.weight_dtype)):
        if dtype not in ("float32", "bfloat16", None):
            return f"{what} is {dtype}, not float32 or bfloat16"
    if problem.cast not in ("before_weight", "after_weight"):
        return f"cast {problem.cast!r} is unknown"
    if problem.weight_per_head and not problem.heads:
        return "a weight per head needs x [T,Q,H]"
    return None


At = Callable[[Expr], Expr]
"""Offset in the row -> the element there, a buffer load."""


def emit_row(
    v: Simd, problem: NormProblem, length: Expr, source: At, weight: At | None, target: At, eps: Expr, offset: Expr
) -> None:
    """Normalises one row of `length` values from source to target.

    The row is read two or three times; it is in the first-level cache after the first. Sums are in float32.
    """
    mean = _mean(v, length, lambda at, n: v.load(source(at), problem.dtype, n)) if problem.centre else None

    def value(at: Expr, n: int) -> Expr:
        x = v.load(source(at), problem.dtype, n)
        return x if mean is None else T.Bind(x - v.splat(mean, n))

    def square(at: Expr, n: int) -> Expr:
        x = value(at, n)
        return x * x

    scale = T.Bind(T.float32(1) / T.sqrt(_mean(v, length, square) + eps))

    def write(at: Expr, n: int, _: int) -> None:
        h = value(at, n) * v.splat(scale, n)
        if weight is not None and problem.weight_dtype is not None:
            w = v.load(weight(at), problem.weight_dtype, n) + v.splat(offset, n)
            if problem.cast == "before_weight":
                h = v.rounded(h, problem.dtype, n)
                w = v.rounded(w, problem.weight_dtype, n)
            h = h * w
        v.store(target(at), h, problem.dtype, n)

    for_chunks(length, v.lanes, UNROLL, write)


def _mean(v: Simd, length: Expr, term: Callable[[Expr, int], Expr]) -> Expr:
    """The mean of term(offset, lanes) over a row."""
    wide, narrow = Registers(UNROLL, v.lanes), Registers(1, 1)
    wide.fill(0.0)
    narrow.fill(0.0)

    def add(at: Expr, n: int, u: int) -> None:
        totals = wide if n > 1 else narrow
        totals[u] = totals[u] + term(at, n)

    for_chunks(length, v.lanes, UNROLL, add)
    total = wide[0]
    for u in range(1, UNROLL):
        total = total + wide[u]
    total = v.reduce("sum", T.Bind(total), v.lanes) + narrow[0]
    return T.Bind(total / T.cast(length, lanes_of("float32", 1)))
