"""The moec op that counts the slots of a layer's experts and, where a capacity is set, drops those beyond it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.library.custom_op("moec::limit_slots", mutates_args=())
def limit_slots(
    experts: Tensor, weights: Tensor, owner: Tensor, num_experts: int, num_owners: int, factor: float, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """experts int[T,K], weights f32[T,K], owner i64[T,K] below num_owners -> kept int[T,K], load i64[num_experts],
    dropped i64[num_owners].

    kept: `experts` with num_experts ("not held here") in the place of dropped slots. load: slots that chose each
    expert, dropped ones too. Of an owner at most ceil(factor * T * K / num_owners) slots stay, those of the greatest
    weight; weights are compared in bfloat16, so that the order of a sum elsewhere decides nothing, and ties keep the
    earlier slot. NaN counts as greatest: it must not be dropped silently. factor 0: nothing is dropped, only counted.
    layer: under which number a runtime counts.
    """
    load = torch.bincount(experts.reshape(-1).long(), minlength=num_experts)[:num_experts]
    if not factor:
        return experts.clone(), load, owner.new_zeros(num_owners)
    capacity = math.ceil(factor * owner.numel() / num_owners)
    scores = weights.reshape(-1).to(torch.bfloat16)
    best_first = torch.sort(scores, descending=True, stable=True).indices
    by_owner, order = torch.sort(owner.reshape(-1)[best_first], stable=True)
    counts = torch.bincount(owner.reshape(-1), minlength=num_owners)
    place = torch.arange(owner.numel(), device=owner.device) - (counts.cumsum(0) - counts)[by_owner]
    beyond = best_first[order[place >= capacity]]
    kept = experts.reshape(-1).index_fill(0, beyond, num_experts).view(experts.shape)
    return kept, load, (counts - capacity).clamp(min=0)


@limit_slots.register_fake
def _(experts, weights, owner, num_experts, num_owners, factor, layer):
    counted = experts.new_empty
    return (
        torch.empty_like(experts),
        counted((num_experts,), dtype=torch.int64),
        counted((num_owners,), dtype=torch.int64),
    )
