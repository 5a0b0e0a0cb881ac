"""Which experts the tokens of a measurement take: uniform, Zipf with a stated exponent, or as a recorded trace has it.

A tuning run on invented routing can make a model slower (FlashInfer's autotuner: 0.6x of its default, its issue 3622),
so a trace is best, and every record says which class it was measured with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.compiler.tune.errors import TuneError
from moec.runtime.routing import read_routing

DEFAULT_ZIPF = 0.4
"""Exponent of expert use where nothing was recorded, as in `moec plan`."""


@dataclasses.dataclass(frozen=True)
class Routing:
    """A routing class.

    name: "uniform", "zipf-0.4", "trace-<8 digits>".  zipf: exponent, 0: uniform.  counts: recorded uses of each expert,
    a row per layer; empty where nothing was recorded.
    """

    name: str
    zipf: float = 0.0
    counts: tuple[tuple[int, ...], ...] = ()

    def sample(self, num_tokens: int, num_experts: int, top_k: int, seed: int) -> Tensor:
        """experts i32[T, K], K different ones for each token, drawn one after the other without replacement.

        Popularity is dealt to experts at random: which numbers are popular is no property of a class. A trace gives
        each draw one of its layers. Raises: TuneError: the trace is of another number of experts.
        """
        g = torch.Generator().manual_seed(seed)
        log_use = self._log_use(num_experts, seed)[torch.randperm(num_experts, generator=g)]
        noise = -torch.log(torch.empty(num_tokens, num_experts).exponential_(generator=g))  # Gumbel top-k
        return (log_use + noise).topk(top_k, dim=1).indices.to(torch.int32)

    def _log_use(self, num_experts: int, seed: int) -> Tensor:
        if not self.counts:
            return -self.zipf * torch.log(torch.arange(1, num_experts + 1, dtype=torch.float32))
        row = self.counts[seed % len(self.counts)]
        _check_experts(row, num_experts)
        return torch.log(torch.tensor(row, dtype=torch.float32) + 0.5)  # unused ones stay possible

    def mean_log_use(self, num_experts: int) -> list[float]:
        """Logarithm of each expert's use, the most popular first: by Zipf's law, or the mean over recorded layers by
        rank. Raises: TuneError: the trace is of another number of experts."""
        if not self.counts:
            return [-self.zipf * math.log(i + 1) for i in range(num_experts)]
        for row in self.counts:
            _check_experts(row, num_experts)
        ranked = [sorted(row, reverse=True) for row in self.counts]
        return [math.log(sum(row[i] / sum(row) for row in ranked) / len(ranked) + 1e-6) for i in range(num_experts)]

    def to_json(self) -> dict[str, Any]:
        """As JSON values; from_json reads it back."""
        return {"name": self.name, "zipf": self.zipf, "counts": [list(row) for row in self.counts]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Routing:
        """What to_json wrote."""
        return cls(data["name"], data["zipf"], tuple(tuple(row) for row in data["counts"]))


def _check_experts(row: Sequence[int], num_experts: int) -> None:
    if len(row) != num_experts:
        raise TuneError(f"the trace has {len(row)} experts in a layer, the model {num_experts}; record it again")


UNIFORM = Routing("uniform")


def zipf(exponent: float) -> Routing:
    """The use of the r-th most popular expert is as r ** -exponent. Raises: TuneError: a negative exponent."""
    if exponent < 0:
        raise TuneError(f"a Zipf exponent is 0 or more, got {exponent}")
    return Routing(f"zipf-{exponent:g}", exponent) if exponent else UNIFORM


ASSUMED = zipf(DEFAULT_ZIPF)
"""The class where nothing was recorded."""


def recorded(counts: Sequence[Sequence[int]], name: str) -> Routing:
    """The class of recorded counts, a row per layer. Raises: TuneError: none, or a layer without a token."""
    rows = tuple(tuple(int(n) for n in row) for row in counts)
    if not rows or any(sum(row) <= 0 or min(row) < 0 for row in rows):
        raise TuneError(f"{name}: the trace has no layer, or one without a token; record it on more text")
    return Routing(name, counts=rows)


def read_trace(path: str | Path) -> Routing:
    """The class of a file that `moec trace` wrote. Raises: FormatError: no such file; TuneError: nothing in it."""
    found = read_routing(path)
    return recorded([layer.counts.tolist() for layer in found.layers], found.name)


def preferred(names: Iterable[str]) -> str | None:
    """The class that says most about real use: a recorded trace (the last one given), else Zipf, else uniform."""
    known = list(names)
    for kind in ("trace-", "zipf-", "uniform"):
        if found := [n for n in known if n.startswith(kind)]:
            return found[-1]
    return known[-1] if known else None
