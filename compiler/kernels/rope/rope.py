"""moec::rope on one tensor, or on queries and keys in one launch; tokens in parallel.

Call: symbol(x, cos, sin, y), or symbol(q, k, cos, sin, q_out, k_out) where the problem has two tensors. x, q and k may
have any stride on all axes but the last (slices of a fused projection need no copy); cos and sin any row stride, 0
included. Outputs are contiguous. compute_dtype "input" in bfloat16 rounds each product and each sum, as the op does, so
the results are equal bit by bit; in float32 within 2e-7 of a float64 evaluation, relative to the pair's length.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moec.compiler.kernels.checks import require, rows_readable
from moec.compiler.kernels.simd import DTYPE_BYTES, Expr, Simd, for_chunks, for_rows, match
from moec.compiler.kernels.spec import DTYPE_TAGS, Cost, vector_specs

SERIAL_ELEMENTS = 32768  # below this a second thread costs more than it saves


@dataclasses.dataclass(frozen=True)
class RopeProblem:
    """moec::rope for a head width; any number of heads and tokens.

    dtype: of x.  angle_dtype: of cos and sin.  pairing, rotary_dim, compute_dtype: as in the op.  two: queries and
    keys. num_heads: of all tensors together, for the cost model.
    """

    head_dim: int
    rotary_dim: int
    dtype: str = "bfloat16"
    angle_dtype: str = "float32"
    pairing: str = "half"
    compute_dtype: str = "input"
    two: bool = False
    num_heads: int = 1

    def refusal(self) -> str | None:
        """Why the kernel does not take the problem, or None."""
        for what, dtype in (("x", self.dtype), ("cos", self.angle_dtype)):
            if dtype not in DTYPE_BYTES:
                return f"{what} is {dtype}, not float32 or bfloat16"
        if self.pairing not in ("half", "interleaved", "deinterleaved"):
            return f"pairing {self.pairing!r} is unknown"
        if self.compute_dtype not in ("input", "float32", self.dtype):
            return f"computing in {self.compute_dtype} is not built"
        if self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim:
            return f"rotary_dim {self.rotary_dim} is odd or does not fit into head_dim {self.head_dim}"
        return None


def symbol(problem: RopeProblem) -> str:
    """The name of the problem's function in a library of kernels."""
    dtypes = "_".join(DTYPE_TAGS[d] for d in (problem.dtype, problem.angle_dtype, problem.compute_dtype))
    name = "rope_qk" if problem.two else "rope"
    return f"moec_{name}_{problem.pairing}_{problem.rotary_dim}of{problem.head_dim}_{dtypes}"


def emit_turn(v: Simd, problem: RopeProblem, x: Any, cos: Any, sin: Any, y: Any) -> None:
    """Turns one head. x, y: place in the head -> element; cos, sin: pair -> element."""
    half = problem.rotary_dim // 2
    lanes = math.gcd(half, v.lanes)
    dtype = problem.dtype if problem.compute_dtype == "input" else problem.compute_dtype

    def rounded(value: Expr) -> Expr:
        return v.rounded(value, dtype, lanes)

    with T.serial(half // lanes) as block:
        i = block * lanes
        c, s = (rounded(v.load(angle(i), problem.angle_dtype, lanes)) for angle in (cos, sin))
        if problem.pairing == "half":
            a, b = (v.load(x(i + start), problem.dtype, lanes) for start in (0, half))
        elif lanes > 1:
            a, b = v.load_pairs(x(2 * i), problem.dtype, lanes)
        else:
            a, b = (v.load(x(2 * i + start), problem.dtype, 1) for start in (0, 1))
        first = rounded(rounded(a * c) - rounded(b * s))
        second = rounded(rounded(b * c) + rounded(a * s))
        if problem.pairing != "interleaved":
            v.store(y(i), first, problem.dtype, lanes)
            v.store(y(i + half), second, problem.dtype, lanes)
        elif lanes > 1:
            v.store_pairs(y(2 * i), first, second, problem.dtype, lanes)
        else:
            v.store(y(2 * i), first, problem.dtype, 1)
            v.store(y(2 * i + 1), second, problem.dtype, 1)

    def copy(at: Expr, n: int, _: int) -> None:
        k = at + problem.rotary_dim
        v.store(y(k), v.load(x(k), problem.dtype, n), problem.dtype, n)

    for_chunks(problem.head_dim - problem.rotary_dim, v.lanes, 1, copy)


def build(problem: RopeProblem, level: str) -> dict[str, Any]:
    """The kernel for an instruction-set level: {exported name: PrimFunc}."""
    v = Simd.of(level)
    names = ("q", "k") if problem.two else ("x",)
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(symbol(problem))
        T.func_attr({"tirx.noalias": True})
        n, heads, d = T.int64(), [T.int64() for _ in names], problem.head_dim
        xs = [match(name, problem.dtype, (n, h, d), strided=2) for name, h in zip(names, heads, strict=True)]
        cos, sin = (match(a, problem.angle_dtype, (n, problem.rotary_dim // 2), strided=1) for a in ("cos", "sin"))
        ys = [match(f"{name}_out", problem.dtype, (n, h, d)) for name, h in zip(names, heads, strict=True)]
        with v.prelude(math.gcd(problem.rotary_dim // 2, v.lanes)):

            def token(t: Any) -> None:
                for x, y, count in zip(xs, ys, heads, strict=True):
                    with T.serial(count) as h:
                        _turn_head(v, problem, x, cos, sin, y, t, h)

            for_rows(n, n * sum(heads[1:], heads[0]) * d <= SERIAL_ELEMENTS, token)
    return {symbol(problem): ib.get()}


def _turn_head(v: Simd, problem: RopeProblem, x: Any, cos: Any, sin: Any, y: Any, t: Expr, h: Expr) -> None:
    emit_turn(v, problem, lambda k: x[t, h, k], lambda k: cos[t, k], lambda k: sin[t, k], lambda k: y[t, h, k])


def rope(library: Any, problem: RopeProblem, xs: tuple[Tensor, ...], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """The kernel on torch tensors: xs one or two of [T,Q,D], cos and sin [T,R/2]. Raises: KernelArgumentError."""
    require(problem.refusal() is None, "moec::rope", f"{problem.refusal()}")
    require(len(xs) == 1 + problem.two, "moec::rope", f"{len(xs)} tensors given")
    for x in xs:
        require(x.dim() == 3 and x.shape[2] == problem.head_dim, "moec::rope", f"x has shape {tuple(x.shape)}")
    outs = tuple(torch.empty(x.shape, dtype=x.dtype) for x in xs)
    library[symbol(problem)](*(rows_readable(t) for t in (*xs, cos, sin)), *outs)
    return outs


def _cost(problem: RopeProblem, num_tokens: int) -> Cost:
    elements = num_tokens * problem.num_heads * problem.head_dim
    return Cost(elements * 2 * DTYPE_BYTES[problem.dtype], elements * 3)


SPECS = vector_specs("tir-rope", "moec::rope", supports=RopeProblem.refusal, cost=_cost, symbol=symbol, build=build)
