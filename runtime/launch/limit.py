"""moec::limit_slots by library calls: slots beyond a capacity are dropped, and all are counted."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class LimitSlots:
    """f(experts int[T,K], weights f32[T,K], owner i64[T,K]) -> kept int[T,K] and two results that programs do not read.

    Of an owner ceil(factor * T * K / num_owners) slots stay, those of the greatest weight in bfloat16, the earlier one
    of equal weights; the others become num_experts. factor 0: all stay. load i64[num_experts] and dropped
    i64[num_owners] add up over the calls.
    """

    def __init__(self, num_experts: int, num_owners: int, factor: float, layer: int) -> None:
        self.num_experts, self.num_owners, self.factor, self.layer = num_experts, num_owners, factor, layer
        self.load = torch.zeros(num_experts, dtype=torch.int64)
        self.dropped = torch.zeros(num_owners, dtype=torch.int64)

    def __call__(self, experts: Tensor, weights: Tensor, owner: Tensor) -> tuple[Tensor, None, None]:
        self.load += torch.bincount(experts.reshape(-1), minlength=self.num_experts)[: self.num_experts]
        if not self.factor:
            return experts, None, None
        capacity = math.ceil(self.factor * owner.numel() / self.num_owners)
        flat = owner.reshape(-1)
        counts = torch.bincount(flat, minlength=self.num_owners)
        beyond = counts - capacity
        if not owner.numel() or int(beyond.max()) <= 0:
            return experts, None, None
        best_first = torch.sort(weights.reshape(-1).to(torch.bfloat16), descending=True, stable=True).indices
        by_owner, order = torch.sort(flat[best_first], stable=True)
        place = torch.arange(flat.numel()) - (counts.cumsum(0) - counts)[by_owner]
        self.dropped += beyond.clamp(min=0)
        gone = best_first[order[place >= capacity]]
        return experts.reshape(-1).index_fill(0, gone, self.num_experts).view(experts.shape), None, None

    def counters(self) -> dict[str, Any]:
        """{"layer", "load": slots that chose each expert, "dropped": of each owner} since the engine was loaded."""
        return {"layer": self.layer, "load": self.load.tolist(), "dropped": self.dropped.tolist()}
