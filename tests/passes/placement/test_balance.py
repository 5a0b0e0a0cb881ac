"""Expert placement against EPLB (re-implemented here by its published description) and against brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from moec.passes.placement.balance import (
    even_out_shares,
    load_bound,
    one_hot,
    pack_heaviest_first,
    replicate_and_pack,
    residency_by_milp,
    swap_descent,
)
from moec.passes.placement.place_experts import imbalance, place_experts, resolve_shares
from moec.passes.placement.routing import sample_trace, zipf_logits

CASES = [  # layers, experts, top-k, groups: Skywork-MoE and DeepSeek-V3 with fewer layers; benchmarks run all of them
    pytest.param(12, 16, 2, 8, id="skywork-8"),
    pytest.param(6, 256, 8, 8, id="v3-8"),
    pytest.param(6, 256, 8, 64, id="v3-64"),
]


@pytest.mark.parametrize("zipf", [0.4, 0.8])
@pytest.mark.parametrize(("layers", "experts", "top_k", "groups"), CASES)
def test_never_above_eplb(layers, experts, top_k, groups, zipf):
    """At or below EPLB with the same slots on the trace, on a held-out trace and on a drifted one."""
    logits = zipf_logits(layers, experts, zipf, seed=5)
    traces = [
        sample_trace(logits, top_k, 4096, seed, drift).popularity() for seed, drift in ((1, 0), (2, 0), (3, 0.25))
    ]
    placed = place_experts(traces[0], groups)
    slots = -(-experts // groups) + 1
    assert placed.resident.sum(axis=1).max() <= slots
    eplb = np.stack([replicate_and_pack(row, groups, slots) for row in traces[0]])
    for trace in traces:
        ours = imbalance(resolve_shares(placed.resident, trace), trace)
        assert ours.mean() <= imbalance(eplb, trace).mean() + 1e-7  # the LP solver's tolerance


def test_without_copies_small_cases_keep_eplb_where_it_is_optimal():
    logits = zipf_logits(8, 16, 0.8, seed=2)
    trace = sample_trace(logits, 2, 4096, 1).popularity()
    placed = place_experts(trace, 8, spare_slots=0)
    reached = np.einsum("me,meg->mg", trace, placed.share).max(axis=1)
    np.testing.assert_allclose(
        reached, placed.bound, rtol=1e-9
    )  # two experts a group: heaviest with lightest is optimal


@pytest.mark.parametrize("seed", range(12))
def test_bounds_hold_for_every_assignment(seed):
    rng = np.random.default_rng(seed)
    groups, experts = int(rng.integers(2, 4)), int(rng.integers(4, 8))
    load = rng.exponential(size=experts)
    slots = -(-experts // groups)
    every = (np.array(a) for a in product(range(groups), repeat=experts))
    legal = (a for a in every if np.bincount(a, minlength=groups).max() <= slots)
    least = min(np.bincount(a, load, groups).max() for a in legal)
    assert load_bound(load, groups, False, slots) <= least * (1 + 1e-12)
    swapped = swap_descent(load[None], pack_heaviest_first(load, groups), groups)
    assert np.bincount(swapped, load, groups).max() >= least * (1 - 1e-12)
    assert (
        np.bincount(swapped, load, groups).max() <= np.bincount(pack_heaviest_first(load, groups), load, groups).max()
    )


@pytest.mark.parametrize("seed", range(4))
def test_milp_is_at_or_below_the_heuristic_and_above_its_own_bound(seed):
    load = np.random.default_rng(seed).exponential(size=8)
    share, bound = residency_by_milp(load, 4, 3)
    greatest = (load @ share).max()
    heuristic = even_out_shares(load, replicate_and_pack(load, 4, 3) > 0)[1]
    assert bound <= greatest * (1 + 1e-6)  # the solver's feasibility tolerance
    assert greatest <= heuristic * (1 + 2e-3)  # it stops within 0.1 % of the optimum
    assert ((share > 1e-9).sum(axis=0) <= 3).all()


@pytest.mark.parametrize("experts", [4, 7, 60, 64])
def test_counts_not_divisible(experts):
    popularity = np.random.default_rng(0).dirichlet(np.ones(experts), size=3)
    placed = place_experts(popularity, 8 if experts > 8 else 4, spare_slots=0)
    assert (placed.resident.sum(axis=2) == 1).all()
    counts = placed.resident.sum(axis=1)
    assert counts.max() - counts.min() <= 1


def test_shares_of_a_copied_expert_sum_to_one():
    popularity = np.random.default_rng(1).dirichlet(np.ones(16), size=4)
    placed = place_experts(popularity, 8, spare_slots=1)
    np.testing.assert_allclose(placed.share.sum(axis=2), 1.0, rtol=1e-9)
    assert not np.any(placed.share[~placed.resident])
    assert (placed.resident.sum(axis=1) == 3).all()  # every slot is used


def test_packing_counts_are_equal():
    load = np.random.default_rng(3).exponential(size=24)
    assert np.bincount(pack_heaviest_first(load, 8)).tolist() == [3] * 8
    assert one_hot(np.array([1, 0]), 2).tolist() == [[0, 1], [1, 0]]
