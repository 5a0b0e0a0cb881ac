"""Slots beyond a capacity: the op against its rule slot by slot, the library against the op, and what is counted."""

from __future__ import annotations

import math

import pytest
import torch

from moec.passes.ir import limit_ops
from moec.runtime.launch.library import LIBRARY

EXPERTS = 5


def routing(tokens: int, top_k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts i32[T, K], no token twice the same, more of the first ones; weights that bf16 holds, with ties."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, EXPERTS, generator=generator) + torch.tensor([0.6, 0.3, 0.1, 0.0, 0.0])
    chosen = scores.topk(top_k).indices.to(torch.int32)
    weights = torch.randint(1, 9, (tokens, top_k), generator=generator) / 16
    return chosen, weights


def stays(owner: list[int], weights: list[float], capacity: int) -> list[bool]:
    """Whether each slot stays: fewer than `capacity` slots of its owner weigh more, or as much and come before it."""

    def before(slot: int) -> int:
        mine = (s for s in range(len(owner)) if owner[s] == owner[slot])
        return sum((-weights[s], s) < (-weights[slot], slot) for s in mine)

    return [before(slot) < capacity for slot in range(len(owner))]


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (7, 2), (33, 3)])
def test_the_op_keeps_the_heaviest_slots_of_each_owner(tokens, top_k, factor):
    chosen, weights = routing(tokens, top_k, tokens)
    owner = chosen.long() % 3  # as devices: experts 0 and 3 on one, 1 and 4, 2
    kept, load, dropped = limit_ops.limit_slots(chosen, weights, owner, EXPERTS, 3, factor, 0)
    capacity = math.ceil(factor * owner.numel() / 3)
    expected = torch.tensor(stays(owner.reshape(-1).tolist(), weights.reshape(-1).tolist(), capacity)).view(owner.shape)
    assert torch.equal(kept != EXPERTS, expected)
    assert torch.equal(kept[expected], chosen[expected]) and kept.dtype == chosen.dtype
    assert load.tolist() == torch.bincount(chosen.reshape(-1), minlength=EXPERTS).tolist()
    assert int(dropped.sum()) == int((~expected).sum())
    assert torch.bincount(owner[kept != EXPERTS], minlength=3).max() <= capacity


def test_the_lowest_weight_is_dropped_first():
    chosen = torch.tensor([[0, 1], [0, 1], [0, 0]])
    weights = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.6]])
    kept, load, dropped = limit_ops.limit_slots(chosen, weights, chosen, 2, 2, 1.0, 0)  # 3 of the 4 slots of expert 0
    assert kept.tolist() == [[0, 1], [2, 1], [0, 0]]
    assert (load.tolist(), dropped.tolist()) == ([4, 2], [1, 0])


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_the_library_is_the_op_and_counts(tokens, factor):
    function = LIBRARY["limit_slots"](num_experts=EXPERTS, num_owners=EXPERTS, factor=factor, layer=3)
    load, dropped = torch.zeros(EXPERTS, dtype=torch.int64), torch.zeros(EXPERTS, dtype=torch.int64)
    for seed in range(3):
        chosen, weights = routing(tokens, 2, seed)
        expected = limit_ops.limit_slots(chosen, weights, chosen.long(), EXPERTS, EXPERTS, factor, 3)
        kept, *unread = function(chosen, weights, chosen.long())
        assert torch.equal(kept, expected[0]) and unread == [None, None]
        load, dropped = load + expected[1], dropped + expected[2]
    assert function.counters() == {"layer": 3, "load": load.tolist(), "dropped": dropped.tolist()}
    assert bool(dropped.sum()) == (factor > 0 and tokens > 1)


def test_nan_is_kept_and_ties_keep_the_earlier_slot():
    chosen = torch.zeros(4, 1, dtype=torch.int64)
    weights = torch.tensor([[0.5], [0.5], [float("nan")], [0.5 + 1e-5]])  # in bfloat16 the last is 0.5 too
    for apply in (limit_ops.limit_slots, lambda *a: LIBRARY["limit_slots"](*a[3:])(*a[:3])):
        kept = apply(chosen, weights, chosen, 1, 1, 0.5, 0)[0]
        assert kept.tolist() == [[0], [1], [0], [1]]


def test_shapes_are_symbolic():
    chosen, weights = routing(6, 2, 0)

    class Layer(torch.nn.Module):
        def forward(self, c, w):
            return torch.ops.moec.limit_slots(c, w, c.long(), EXPERTS, EXPERTS, 1.0, 0)[0]

    rows = torch.export.Dim("rows")
    exported = torch.export.export(Layer(), (chosen, weights), dynamic_shapes=({0: rows}, {0: rows}))
    other = routing(9, 2, 1)
    assert torch.equal(exported.module()(*other), Layer()(*other))
