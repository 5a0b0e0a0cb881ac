"""What bench_small_kernels.py times: for each case a compiled kernel and the library's function for the same op.

Correctness and speed share these cases: before a case is timed, both results are compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.compiler.kernels.attention import cached_attention as attention
from moec.compiler.kernels.attention.problem import AttentionProblem
from moec.compiler.kernels.gate import gate, gate_linear
from moec.compiler.kernels.gate.problem import GateProblem
from moec.compiler.kernels.linear import linear
from moec.compiler.kernels.linear.linear import LinearProblem
from moec.compiler.kernels.mlp import gated_mlp
from moec.compiler.kernels.mlp.gated_mlp import MlpProblem
from moec.compiler.kernels.norm import add_rms_norm
from moec.compiler.kernels.norm.row import NormProblem
from moec.compiler.kernels.rope import rope
from moec.compiler.kernels.rope.rope import RopeProblem
from moec.passes.ir.gate import GateSpec
from moec.runtime.batch import Batch
from moec.runtime.launch import library

COLD_BYTES = 256 << 20  # weights are taken in turn from copies of this much together, as in a model's layers


@dataclasses.dataclass(frozen=True)
class Case:
    """kernel, peer: round -> result (a tensor that the two must agree on). num_bytes: read from memory per call."""

    name: str
    tokens: int
    kernel: Callable[[int], Tensor]
    peer: Callable[[int], Tensor]
    num_bytes: int
    tolerance: float


Load = Callable[[dict[str, Any], str], Any]
"""(functions, level) -> loaded kernel library."""


def copies_of(make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    first = make()
    size = sum(t.numel() * t.element_size() for t in first)
    return [first] + [tuple(t.clone() for t in first) for _ in range(min(max(COLD_BYTES // size, 1), 8) - 1)]


def norm_cases(load: Load, level: str, dtype: str, tokens: list[int]) -> Iterator[Case]:
    width, kind = 2048, getattr(torch, dtype)
    problem = NormProblem(width, dtype, dtype)
    call = load(add_rms_norm.build(problem, level), level)[add_rms_norm.symbol(problem)]
    peer = library.add_rms_norm(1e-6)
    for t in tokens:
        x, r, w = torch.randn(t, width).to(kind), torch.randn(t, width).to(kind), torch.randn(width).to(kind)
        y, total = torch.empty_like(x), torch.empty_like(x)

        def kernel(_: int, args: tuple[Any, ...] = (x, r, w, y, total, 1e-6, 0.0)) -> Tensor:
            call(*args)
            return args[3]

        yield Case("add_rms_norm H2048", t, kernel, lambda _, a=(x, r, w): peer(*a)[0], 0, 2**-7)


def rope_cases(load: Load, level: str, dtype: str, tokens: list[int]) -> Iterator[Case]:
    kind = getattr(torch, dtype)
    problem = RopeProblem(128, 128, dtype, two=True)
    call = load(rope.build(problem, level), level)[rope.symbol(problem)]
    peer = library.rope("half", 128)
    for t in tokens:
        q, k = torch.randn(t, 32, 128).to(kind), torch.randn(t, 8, 128).to(kind)
        a = torch.randn(t, 64)
        args = (q, k, a.cos(), a.sin(), torch.empty_like(q), torch.empty_like(k))

        def kernel(_: int, args: tuple[Tensor, ...] = args) -> Tensor:
            call(*args)
            return args[4]

        def both(_: int, args: tuple[Tensor, ...] = args) -> Tensor:
            peer(args[1], args[2], args[3])
            return peer(args[0], args[2], args[3])

        yield Case("rope q32 k8 D128", t, kernel, both, 0, 1e-5)


def gate_cases(load: Load, level: str, dtype: str, tokens: list[int]) -> Iterator[Case]:
    """Logits of few bits and exact sums would hide nothing here: times do not depend on values."""
    kind = getattr(torch, dtype)
    for width, num_experts, top_k in ((4096, 8, 2), (2048, 64, 6), (7168, 256, 8)):
        spec = GateSpec(top_k, renormalise=True).encode()
        problem = GateProblem(spec, num_experts, "float32", None, width, dtype, dtype)
        of_logits = GateProblem(spec, num_experts, "float32")
        loaded = load(gate_linear.build(problem, level) | gate.build(of_logits, level), level)
        weights = copies_of(lambda n=num_experts, h=width: (torch.randn(n, h).to(kind) / h**0.5,))
        for t in tokens:
            x, logits, scratch = torch.randn(t, width).to(kind), *torch.randn(2, t, num_experts)
            out = torch.empty(t, top_k), torch.empty(t, top_k, dtype=torch.int32)
            fused, peer = loaded[gate_linear.symbol(problem)], library.gate_linear(spec, "float32")

            def kernel(i: int, a: Any = (fused, x, weights, scratch, out)) -> Tensor:
                a[0](a[1], a[2][i % len(a[2])][0], a[3], *a[4])
                return a[4][0]

            name = f"gate_linear H{width} E{num_experts} K{top_k}"
            size = weights[0][0].numel() * kind.itemsize
            cell = lambda i, a=(peer, x, weights): a[0](a[1], a[2][i % len(a[2])][0], None, None)[0]  # noqa: E731
            yield Case(name, t, kernel, cell, size, 1e-3)
            plain, peer_plain = loaded[gate.symbol(of_logits)], library.gate(spec)

            def from_logits(_: int, a: Any = (plain, logits, out)) -> Tensor:
                a[0](a[1], *a[2])
                return a[2][0]

            name = f"gate E{num_experts} K{top_k}"
            yield Case(name, t, from_logits, lambda _, a=(peer_plain, logits): a[0](a[1], None)[0], 0, 1e-5)


def attention_cases(load: Load, level: str, dtype: str, tokens: list[int]) -> Iterator[Case]:
    """Decode of `tokens` sequences of 1024 keys, and prefill of one prompt of `tokens`."""
    for q_heads, kv_heads in ((32, 8), (16, 16), (64, 4)):
        problem = AttentionProblem(q_heads, kv_heads, 128, 128, dtype, dtype)
        call = load(attention.build(problem, level), level)[attention.symbol(problem)]
        for t in tokens:
            for name, slots, positions in (
                ("decode 1024", torch.arange(t), torch.full((t,), 1023)),
                ("prefill", torch.zeros(t, dtype=torch.long), torch.arange(t)),
            ):
                if (name == "decode 1024" and t > 64) or (name == "prefill" and t == 1):
                    continue
                yield _attention(call, problem, name, slots, positions)


def _attention(call: Any, problem: AttentionProblem, name: str, slots: Tensor, positions: Tensor) -> Case:
    kind, t = getattr(torch, problem.dtype), len(slots)
    num_slots, length = int(slots.max()) + 1, int(positions.max()) + 1
    # as engines keep them on a processor: the entries of a head follow each other
    by_head = (num_slots, problem.num_kv_heads, length, 128)
    caches = [torch.randn(by_head).to(kind).transpose(1, 2) for _ in range(2)]
    q, k, v = (torch.randn(t, h, 128).to(kind) for h in (problem.num_heads, *[problem.num_kv_heads] * 2))
    out, batch = torch.empty_like(q), Batch.of(slots, positions)
    peer = library.cached_attention(128**-0.5)

    def kernel(_: int) -> Tensor:
        call(q, k, v, *caches, slots, positions, out, 128**-0.5, 0, 0, 0.0)
        return out

    size = sum(c.numel() * c.element_size() for c in caches)
    title = f"attention q{problem.num_heads} kv{problem.num_kv_heads} {name}"
    return Case(title, t, kernel, lambda _: peer(batch, q, k, v, *caches, slots, positions), size, 2**-5)


def linear_cases(load: Load, level: str, dtype: str, tokens: list[int]) -> Iterator[Case]:
    kind = getattr(torch, dtype)
    problem = LinearProblem(1, 1, dtype, dtype)
    call = load(linear.build(problem, level), level)[linear.symbol(problem)]
    for length, columns in ((256, 512), (2048, 3072), (2048, 32000)):
        weights = copies_of(lambda k=length, n=columns: (torch.randn(n, k).to(kind) / k**0.5,))
        for t in tokens:
            x, y = torch.randn(t, length).to(kind), torch.empty(t, columns, dtype=kind)

            def kernel(i: int, a: Any = (x, weights, y)) -> Tensor:
                call(a[0], a[1][i % len(a[1])][0], a[2])
                return a[2]

            size = length * columns * kind.itemsize
            peer = lambda i, a=(x, weights): F.linear(a[0], a[1][i % len(a[1])][0])  # noqa: E731
            yield Case(f"linear K{length} N{columns}", t, kernel, peer, size, 2**-5)


def mlp_cases(load: Load, level: str, dtype: str, tokens: list[int]) -> Iterator[Case]:
    kind, width, inner = getattr(torch, dtype), 2048, 5632
    problem = MlpProblem(width, inner, "silu", dtype)
    call = load(gated_mlp.build(problem, level), level)[gated_mlp.symbol(problem)]
    peer = library.gated_mlp("silu")
    weights = copies_of(
        lambda: (torch.randn(2 * inner, width).to(kind) / width**0.5, torch.randn(width, inner).to(kind) / inner**0.5)
    )
    for t in tokens:
        x, y, h = torch.randn(t, width).to(kind), torch.empty(t, width, dtype=kind), torch.empty(t, inner, dtype=kind)

        def kernel(i: int, a: Any = (x, h, y)) -> Tensor:
            call(a[0], *weights[i % len(weights)], a[1], a[2])
            return a[2]

        size = 3 * width * inner * kind.itemsize
        cell = lambda i, x=x: peer(x, *weights[i % len(weights)], None, None)  # noqa: E731
        yield Case(f"gated_mlp H{width} F{inner}", t, kernel, cell, size, 2**-5)


CASES: dict[str, Callable[[Load, str, str, list[int]], Iterator[Case]]] = {
    "norm": norm_cases,
    "rope": rope_cases,
    "gate": gate_cases,
    "attention": attention_cases,
    "linear": linear_cases,
    "mlp": mlp_cases,
}
