"""Greedy decoding on a captured graph, run eagerly: the plain twin of the runtime's generate()."""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.capture.captured import Captured
from moec.passes.ir.evaluate import evaluate


def new_caches(captured: Captured, slots: int, length: int) -> list[Tensor]:
    """Empty caches in placeholder order."""
    return [torch.zeros(c.input_shape(slots, length), dtype=c.dtype) for c in captured.info.caches]


class Server:
    """A captured language model with its caches. Each call is a step over a ragged batch."""

    def __init__(self, captured: Captured, slots: int, length: int) -> None:
        self.captured = captured
        self.caches = new_caches(captured, slots, length)
        tensors: dict[str, Tensor] = {}

        def read(name: str) -> Tensor:
            if name not in tensors:
                tensors[name] = captured.read(name)
            return tensors[name]

        self.read = read

    def step(self, items: list[tuple[int, int, list[int]]]) -> Tensor:
        """items: (cache slot, first position, tokens) of each sequence -> logits of each one's last token."""
        tokens = [t for _, _, ts in items for t in ts]
        positions = [p for _, first, ts in items for p in range(first, first + len(ts))]
        slots = [s for s, _, ts in items for _ in ts]
        inputs = [torch.tensor(v, dtype=torch.long) for v in (tokens, positions, slots)]
        logits = evaluate(self.captured.graph_module, [*inputs, *self.caches], self.read)
        ends = torch.tensor([len(ts) for _, _, ts in items]).cumsum(0) - 1
        return logits[ends]


def greedy_batched(captured: Captured, prompts: list[list[int]], steps: int) -> tuple[list[list[int]], list[Tensor]]:
    """All prompts in one ragged prefill, then T = len(prompts) decode steps, in reversed order, in scattered slots."""
    n = len(prompts)
    server = Server(captured, n + 2, max(map(len, prompts)) + steps)
    slot = [n - i for i in range(n)]
    new: list[list[int]] = [[] for _ in prompts]
    logits: list[list[Tensor]] = [[] for _ in prompts]
    rows = server.step([(slot[i], 0, prompts[i]) for i in range(n)])
    for step in range(steps):
        for i in range(n):
            logits[i].append(rows[i])
            new[i].append(int(rows[i].argmax()))
        if step + 1 < steps:
            items = [(slot[i], len(prompts[i]) + step, new[i][-1:]) for i in range(n)]
            rows = server.step(items[::-1]).flip(0)
    return new, [torch.stack(x) for x in logits]


def greedy_single(captured: Captured, prompt: list[int], steps: int) -> tuple[list[int], Tensor]:
    """One prompt alone, its prefill split in two calls, then decode steps with T = 1."""
    server = Server(captured, 2, len(prompt) + steps)
    half = len(prompt) // 2
    if half:
        server.step([(1, 0, prompt[:half])])
    rows = server.step([(1, half, prompt[half:])])
    new, logits = [int(rows[0].argmax())], [rows[0]]
    for step in range(steps - 1):
        rows = server.step([(1, len(prompt) + step, new[-1:])])
        new.append(int(rows[0].argmax()))
        logits.append(rows[0])
    return new, torch.stack(logits)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Greatest difference over the greatest magnitude."""
    return float((found - expected).abs().max() / expected.abs().max())
