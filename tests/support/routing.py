"""Which experts a model chose: recorded inside of an engine, and inside of the reference model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moec.runtime.engine import Engine
from moec.runtime.executor import Executor
from moec.runtime.format import weights_name
from moec.runtime.loader import kernels_of, map_weights, open_library
from moec.runtime.program import Program, Step, buffers_in


class RecordingExecutor(Executor):
    """An executor of a program that gives every layer's chosen experts as well; `chosen` holds those of each call."""

    def __init__(self, program: Program, *rest: Any) -> None:
        super().__init__(program, *rest)
        self.chosen: list[list[Tensor]] = []

    def __call__(self, inputs: Sequence[Tensor], batch: Any = None) -> list[Tensor]:
        logits, *experts = super().__call__(inputs, batch)
        self.chosen.append([e.sort(-1).values.long() for e in experts])
        return [logits]


def record(engine: Engine, top_k: int) -> RecordingExecutor:
    """Puts an executor into the engine that notes the experts [T, top_k] of each layer, in rising order."""
    library = open_library(engine.directory, engine.manifest)
    made = (map_weights(engine.directory / weights_name(0)), *kernels_of(library, engine.manifest))
    engine.executor = RecordingExecutor(_giving_experts(engine.executor.program, top_k), *made)
    return engine.executor


def _giving_experts(program: Program, top_k: int) -> Program:
    """The program with a copy of each integer result [T, top_k] as a further output."""
    buffers, steps, copies = list(program.buffers), [], []
    for at, step in enumerate(program.steps):
        steps.append(step)
        wanted = {i for later in program.steps[at + 1 :] for i in _read(later)}
        for made in sorted(wanted & set(_made(step))):
            found = program.buffers[made]
            if found.dtype in ("int32", "int64") and tuple(found.shape) == ("T", top_k):
                copies.append(len(buffers))
                buffers.append(dataclasses.replace(found, name=f"chosen_{made}", kind="value", offset=None))
                steps.append(Step("aten", "aten.clone.default", step.node, ({"buffer": made},), outputs=(copies[-1],)))
    outputs = (*program.outputs, *copies)
    return dataclasses.replace(program, buffers=tuple(buffers), steps=tuple(steps), outputs=outputs)


def _flat(step: Step) -> list[Step]:
    """The step, or those of its variants."""
    return [s for _, steps in step.variants for s in steps] or [step]


def _made(step: Step) -> list[int]:
    return [o for s in _flat(step) for o in s.outputs if o is not None]


def _read(step: Step) -> list[int]:
    return [i for s in _flat(step) for i in buffers_in(s.args)]


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[list[Tensor]]]:
    """The experts of each layer, one list of rows [T, K] per layer, of what the reference computes meanwhile."""
    blocks = [m for n, m in model.named_modules() if n.endswith(".experts")]
    chosen: list[list[Tensor]] = [[] for _ in blocks]

    def hook(layer: int) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            index = next(a for a in args if isinstance(a, Tensor) and not a.is_floating_point())
            chosen[layer].append(index.sort(-1).values)

        return note

    handles = [m.register_forward_pre_hook(hook(i)) for i, m in enumerate(blocks)]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def forced(model: nn.Module, chosen: Sequence[Tensor], *, renormalise: bool) -> Iterator[None]:
    """The reference model takes these experts [T, K] of each layer, weighed by its own softmax over all experts.

    For routers that return (logits [T, E], weights, experts), as transformers' Qwen routers do.
    """
    routers = [m for n, m in model.named_modules() if type(m).__name__.endswith("TopKRouter")]
    if len(routers) != len(chosen):
        raise ValueError(f"{len(routers)} routers, but experts of {len(chosen)} layers")

    def hook(experts: Tensor) -> Any:
        def choose(module: nn.Module, args: Any, given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
            logits, weights, _ = given
            mine = logits.float().softmax(-1).gather(-1, experts)
            total = mine.sum(-1, keepdim=True) if renormalise else 1.0
            return logits, (mine / total).to(weights.dtype), experts

        return choose

    handles = [r.register_forward_hook(hook(e)) for r, e in zip(routers, chosen, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def recount(model: nn.Module, sequences: Sequence[Sequence[int]], top_k: int) -> tuple[list[Tensor], list[Tensor]]:
    """What the reference's router logits say of sequences, one at a time: how often each expert is chosen, i64[E] for
    each layer, and how often two are chosen together, i64[E, E]."""
    counts: list[Tensor] = []
    pairs: list[Tensor] = []
    for tokens in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([list(tokens)]), output_router_logits=True).router_logits
        chosen = [torch.zeros_like(l).scatter_(-1, l.topk(top_k, -1).indices, 1.0) for l in logits]  # [T, E] each
        here, both = [c.sum(0).long() for c in chosen], [(c.T @ c).long() for c in chosen]
        counts = here if not counts else [a + b for a, b in zip(counts, here, strict=True)]
        pairs = both if not pairs else [a + b for a, b in zip(pairs, both, strict=True)]
    return counts, pairs
