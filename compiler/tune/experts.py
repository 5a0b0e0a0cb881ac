"""Measures experts kernels: one layer with random weights in the kernels' layout, routed as a routing class says.

Only three experts have values of their own; the others are copies at their own addresses, which read from memory like
any other. So the reference needs three experts' weights, and a layer of gigabytes is made in seconds.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moec.passes.ir.ops  # noqa: F401  (registers moec::experts, the reference)
from moec.compiler.codegen.llvm import build_library
from moec.compiler.kernels.experts import call, knobs
from moec.compiler.kernels.experts.kernel import ExpertsKernel
from moec.compiler.kernels.experts.layout import pack_bias_down, pack_bias_gate_up
from moec.compiler.kernels.spec import ExpertsProblem
from moec.compiler.tune.record import Config
from moec.compiler.tune.routing import Routing
from moec.compiler.tune.subject import Call
from moec.passes.ir.activation import Activation
from moec.passes.ir.formats import parse_format
from moec.passes.ir.quantise import dequantise_parts, quantise
from moec.runtime.launch.cpu import load_library
from moec.runtime.pages import empty_huge

DISTINCT = 3
CHECKED_TOKENS = 24
INPUT_SETS = 6
"""Inputs that calls take in turn, each with a rotation of the experts of its own: no call finds the last one's weights
in a cache."""
# h and y are rounded to bf16 once each, 2**-9; int8 rows add a rounding to 1/127 of a row's largest. Sums of f32
# problems differ in order alone.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 5e-2}


@dataclasses.dataclass(frozen=True)
class Built:
    """A candidate: its function and the kernel with its plan."""

    function: Any
    kernel: ExpertsKernel


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One set: x [T,H], weights f32[T,K], experts i32[T,K], shared_weight f32[T] or None."""

    x: Tensor
    weights: Tensor
    experts: Tensor
    shared: Tensor | None


class ExpertsSubject:
    """One problem. problem: the fields of ExpertsProblem; level: of the instruction set; cache_dir: of libraries.

    A task is {"tokens": T, "routing": Routing.to_json(), "seed": n}.
    """

    def __init__(self, problem: dict[str, Any], level: str, cache_dir: str) -> None:
        self._problem, self._level, self._cache_dir = ExpertsProblem(**problem), level, Path(cache_dir)
        self._built: dict[str, Built] = {}
        own = _distinct_weights(self._problem)
        self._packed = _packed(self._problem, own)
        self._own = _as_read(self._problem, own)
        self._tokens, self._workspace = 0, torch.empty(0, dtype=torch.uint8)
        self._sets: list[Inputs] = []

    def _build(self, kernel: ExpertsKernel) -> Built:
        made = build_library(kernel.build(self._problem), self._level, self._cache_dir)
        return Built(load_library(made.path, made.level)[kernel.symbol(self._problem)], kernel)

    def prepare(self, task: dict[str, Any]) -> None:
        """Inputs of a number of tokens and a routing class."""
        p, routing, seed = self._problem, Routing.from_json(task["routing"]), int(task["seed"])
        self._tokens = int(task["tokens"])
        self._sets = [_inputs(p, self._tokens, routing, one) for one in input_seeds(seed)]
        self._y = torch.empty(self._tokens, p.hidden, dtype=getattr(torch, p.dtype))

    def build(self, config: Config) -> Built:
        """The kernel of a configuration, from the cache of libraries where it is there."""
        kernel = knobs.configured(config)
        name = f"{kernel.name} {kernel.variant}"
        if name not in self._built:
            self._built[name] = self._build(kernel)
        return self._built[name]

    def check(self, candidate: Built, seed: int) -> str:
        """Against moec::experts in f32, on some of the tokens of one set of inputs."""
        given = self._given(seed)
        rows = torch.arange(0, self._tokens, max(1, self._tokens // CHECKED_TOKENS))
        expected = self._reference(given, rows)
        self._y.fill_(torch.nan)
        self._run(candidate, given)
        got = self._y[rows].float()
        if not bool(self._y.isfinite().all()):
            return "the result is not finite, or part of it was not written"
        error = float((got - expected).norm() / expected.norm().clamp_min(1e-30))
        kind = "int8" if candidate.kernel.takes == call.INT8 else self._problem.dtype
        limit = TOLERANCE[kind]
        return "" if error < limit else f"relative error {error:.2g} against the reference, at most {limit:g} is right"

    def call(self, candidate: Built, seed: int) -> Call:
        """One layer on the inputs of a seed."""
        given = self._given(seed)
        self._room(candidate)
        return lambda: self._run(candidate, given)

    def _given(self, seed: int) -> Inputs:
        """A set with its experts rotated, so that the same work is done on other weights."""
        base = self._sets[seed % len(self._sets)]
        turn = (seed * 2654435761 >> 8) % self._problem.num_experts
        experts = ((base.experts + turn) % self._problem.num_experts).to(torch.int32)
        return dataclasses.replace(base, experts=experts)

    def _room(self, candidate: Built) -> None:
        size = candidate.kernel.plan(self._problem).workspace_bytes(self._tokens)
        if self._workspace.numel() < size:
            self._workspace = empty_huge(size)  # as an engine has it

    def _run(self, candidate: Built, given: Inputs) -> None:
        self._room(candidate)
        optional = [t for t in (self._packed.b_gate_up, self._packed.b_down, given.shared) if t is not None]
        candidate.function(
            given.x, given.weights, given.experts, self._packed.w_gate_up, self._packed.w_down, *optional,
            self._workspace, self._y,
        )  # fmt: skip

    def _reference(self, given: Inputs, rows: Tensor) -> Tensor:
        """The op's own meaning in f32: an expert's weights are those of the distinct one that it copies."""
        p, own = self._problem, self._own
        stacks = (own.w_gate_up, own.w_down, own.b_gate_up, own.b_down)
        return torch.ops.moec.experts(
            given.x[rows].float(), given.weights[rows], given.experts[rows].long() % DISTINCT, *stacks,
            None if given.shared is None else given.shared[rows], p.act, p.num_shared, p.weight_on_input,
        )  # fmt: skip


def _distinct_weights(problem: ExpertsProblem) -> call.PackedExperts:
    """Stacks of three experts as the op takes them, before they are quantised; biases f32."""
    p, g = problem, torch.Generator().manual_seed(1)
    width = p.inner * (2 if Activation.parse(p.act).gated else 1)

    def stack(rows: int, depth: int) -> Tensor:
        made = torch.empty(DISTINCT, rows, depth, dtype=getattr(torch, p.dtype))
        for expert in made:
            expert.copy_(torch.randn(rows, depth, generator=g) * depth**-0.5)
        return made

    def bias(columns: int) -> Tensor | None:
        return torch.randn(DISTINCT, columns, generator=g) * 0.5 if p.has_bias else None

    return call.PackedExperts(stack(width, p.hidden), stack(p.hidden, p.inner), bias(width), bias(p.hidden))


def _as_read(problem: ExpertsProblem, own: call.PackedExperts) -> call.PackedExperts:
    """The stacks in f32, with the numbers that their formats' codes stand for, the shared experts behind."""

    def read(stack: Tensor, name: str) -> Tensor:
        if not name:
            return stack.float()
        format = parse_format(name)
        return torch.stack([dequantise_parts(quantise(expert, format)).float() for expert in stack])

    order = list(range(len(own.w_gate_up)))
    if problem.num_shared:
        order = [*range(DISTINCT), *((problem.num_experts + j) % DISTINCT for j in range(problem.num_shared))]
    up, down = read(own.w_gate_up, problem.format_up), read(own.w_down, problem.format_down)
    b_up, b_down = (None if b is None else b[order] for b in (own.b_gate_up, own.b_down))
    return call.PackedExperts(up[order], down[order], b_up, b_down)


def _packed(problem: ExpertsProblem, own: call.PackedExperts) -> call.PackedExperts:
    """All experts in the kernels' layout, on huge pages."""
    p, name, gated = problem, call.weight_layout(problem), Activation.parse(problem.act).gated
    total = p.num_experts + p.num_shared

    def stack(few: Tensor) -> Tensor:
        num_bytes = few[0].numel() * few.element_size() * total
        out = empty_huge(num_bytes).view(few.dtype).view(total, *few.shape[1:])
        for e in range(total):
            out[e] = few[e % DISTINCT]
        return out

    up = stack(call.pack_stack(p.format_up, own.w_gate_up, name, gated))
    down = stack(call.pack_stack(p.format_down, own.w_down, name, None))
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    if own.b_gate_up is not None and own.b_down is not None:
        which = torch.arange(total) % DISTINCT
        biases = (pack_bias_gate_up(own.b_gate_up[which], gated), pack_bias_down(own.b_down[which]))
    return call.PackedExperts(up, down, *biases)


def input_seeds(seed: int) -> list[int]:
    """Seeds of the sets of inputs of a task with this seed; Routing.sample takes them."""
    return [seed * 1000 + number for number in range(INPUT_SETS)]


def _inputs(problem: ExpertsProblem, num_tokens: int, routing: Routing, seed: int) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, problem.hidden, generator=g).to(getattr(torch, problem.dtype))
    weights = torch.rand(num_tokens, problem.top_k, generator=g) + 0.1
    experts = routing.sample(num_tokens, problem.num_experts, problem.top_k, seed)
    shared = torch.rand(num_tokens, generator=g) if problem.has_shared_weight else None
    return Inputs(x, weights / weights.sum(1, keepdim=True), experts, shared)
