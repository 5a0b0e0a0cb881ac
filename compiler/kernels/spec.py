"""What a kernel says about itself: which problem it solves, on which processor, at what price.

A catalogue entry is a KernelSpec. Lowering asks `refusal(problem)`, compares `cost(problem, num_tokens)` or measured
times, and records why the others lost. Problems are plain descriptions: shapes and meanings, no tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from moec.runtime.launch.cpu_features import missing_features

Problem = TypeVar("Problem")
VECTOR_LEVELS = ("avx2", "avx512f", "avx512_bf16")
"""Keys of cpu_features.LEVELS that differ in their vectors alone."""
DTYPE_TAGS = {"float32": "f32", "bfloat16": "bf16", "int8": "i8", "input": "in", None: "none"}
"""What the names of functions in a library call dtypes, "input" (as x is) and what is absent."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Work of one call. num_bytes: memory that cannot come from a cache; num_flops: multiply and add count 2."""

    num_bytes: int
    num_flops: int


@dataclasses.dataclass(frozen=True)
class ExpertsProblem:
    """One layer of experts: moec::experts for fixed weights and any number of tokens.

    hidden H, inner F, num_experts E (routed), top_k K, num_shared: stacked experts after the routed ones that see
    every token. act: passes/ir/activation.py. dtype: of x, the weights and y, "bfloat16" or "float32". has_bias:
    b_gate_up and b_down are given. has_shared_weight: the shared experts are weighted by shared_weight f32[T].
    format_up, format_down: names of the stacks' weight formats (passes/ir/formats.py); "": as dtype says.

    What accumulates where: products of a row and a column are summed in f32; with formats "-a8" in i32 over a group
    (over K where a row has one scale), and then in f32. The weighted sum over a token's experts is f32, rounded once to
    dtype. Between the two projections h is rounded to dtype, with "-a8" to int8 with a scale per row, as x is.
    """

    hidden: int
    inner: int
    num_experts: int
    top_k: int
    num_shared: int = 0
    act: str = "silu"
    dtype: str = "bfloat16"
    has_bias: bool = False
    has_shared_weight: bool = False
    weight_on_input: bool = False
    format_up: str = ""
    format_down: str = ""


@dataclasses.dataclass(frozen=True)
class KernelSpec(Generic[Problem]):
    """A kernel of the catalogue.

    name      unique, kebab-case, ends in the instruction-set level where there are several
    op        the moec op that it implements, e.g. "moec::experts"
    level     key of cpu_features.LEVELS that it is built for; None: runs anywhere
    supports  None, or the reason in words why the kernel does not take the problem
    cost      work for a number of tokens
    symbols   names of the functions that `build` returns
    build     problem -> {exported name: tirx.PrimFunc}, for codegen.llvm.build_library; None for a library kernel
    pack      problem -> name of the weight layout (kernels/experts/layout.py), None: weights as the op has them
    arithmetic  what the products are of: "int8", "bfloat16" (pairs), "codes" (as float32), "code_pairs" (as bfloat16);
                None: float32 numbers
    workspace_bytes   scratch for a number of tokens, 64-byte aligned, contents irrelevant before and after
    """

    name: str
    op: str
    level: str | None
    supports: Callable[[Problem], str | None]
    cost: Callable[[Problem, int], Cost]
    symbols: Callable[[Problem], Sequence[str]]
    build: Callable[[Problem], dict[str, Any]] | None = None
    pack: Callable[[Problem], str | None] = lambda problem: None
    arithmetic: str | None = None
    workspace_bytes: Callable[[Problem, int], int] = lambda problem, num_tokens: 0

    def refusal(self, problem: Problem, features: frozenset[str] | None = None) -> str | None:
        """Why the kernel cannot be used for the problem on a processor (default: this one), or None."""
        if self.level is not None and (lacking := missing_features(self.level, features)):
            return f"needs {self.level}, the processor lacks {', '.join(lacking)}"
        return self.supports(problem)


def vector_specs(
    name: str,
    op: str,
    *,
    supports: Callable[[Problem], str | None],
    cost: Callable[[Problem, int], Cost],
    symbol: Callable[[Problem], str],
    build: Callable[[Problem, str], dict[str, Any]],
    arithmetic: str | None = None,
    workspace_bytes: Callable[[Problem, int], int] = lambda problem, num_tokens: 0,
    levels: Sequence[str] = VECTOR_LEVELS,
) -> tuple[KernelSpec[Problem], ...]:
    """A kernel of one function at each level, called NAME-LEVEL.

    symbol: the name of its function.  build: problem, level -> the function by that name.  The rest: see KernelSpec.
    """

    def spec(level: str) -> KernelSpec[Problem]:
        return KernelSpec(
            name=f"{name}-{level}",
            op=op,
            level=level,
            supports=supports,
            cost=cost,
            symbols=lambda problem: (symbol(problem),),
            build=lambda problem: build(problem, level),
            arithmetic=arithmetic,
            workspace_bytes=workspace_bytes,
        )

    return tuple(spec(level) for level in levels)
