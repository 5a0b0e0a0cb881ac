"""Integer shares: exact makespan, dealing with rotation, pipeline cuts."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from moec.passes.placement.shares import cut_stages, deal_units, fewest_makespan


@pytest.mark.parametrize("seed", range(20))
def test_fewest_makespan_is_the_least(seed):
    rng = np.random.default_rng(seed)
    ranks, units = int(rng.integers(1, 4)), int(rng.integers(0, 9))
    costs = rng.uniform(0.5, 2.0, ranks)
    deals = (d for d in product(range(units + 1), repeat=ranks) if sum(d) == units)
    least = min(max(n * c for n, c in zip(d, costs, strict=True)) for d in deals)
    assert fewest_makespan(units, costs) == pytest.approx(least, rel=1e-12)  # the same products, in another order


def test_skywork_heads_rotate():
    fixed = deal_units(36, 4, np.full(8, 5), np.ones(8), rotate=False)
    assert fixed.tolist() == [[5, 5, 5, 5, 4, 4, 4, 4]] * 4
    moved = deal_units(36, 4, np.full(8, 5), np.ones(8), rotate=True)
    assert moved[:2].tolist() == [[5, 5, 5, 5, 4, 4, 4, 4], [4, 4, 4, 4, 5, 5, 5, 5]]
    assert moved.sum(axis=0).tolist() == [18] * 8


@pytest.mark.parametrize("seed", range(30))
def test_deals_whole_units_within_caps_and_near_target(seed):
    rng = np.random.default_rng(seed)
    ranks, units, layers = int(rng.integers(1, 9)), int(rng.integers(1, 70)), int(rng.integers(1, 12))
    target = rng.uniform(0.2, 1.0, ranks)
    dealt = deal_units(units, layers, np.full(ranks, units), target, rotate=True)
    assert (dealt.sum(axis=1) == units).all()
    assert dealt.min() >= 0
    ideal = layers * units * target / target.sum()
    assert np.abs(dealt.sum(axis=0) - ideal).max() < 2  # running totals stay within two units of their target


def test_caps_hold():
    dealt = deal_units(10, 3, np.array([2, 9, 2]), np.array([1.0, 1.0, 1.0]), rotate=True)
    assert (dealt <= [2, 9, 2]).all()
    assert (dealt.sum(axis=1) == 10).all()


@pytest.mark.parametrize("seed", range(10))
def test_cut_is_the_best(seed):
    rng = np.random.default_rng(seed)
    layers, stages = 7, int(rng.integers(1, 5))
    cost = rng.uniform(0.5, 2.0, layers)
    speed = rng.uniform(0.5, 2.0, stages)

    def stage_cost(stage: int, start: int, end: int) -> float:
        return float(cost[start:end].sum() / speed[stage])

    def worst(cuts: tuple[int, ...]) -> float:
        return max(stage_cost(s, cuts[s], cuts[s + 1]) for s in range(stages))

    every = (worst((0, *inner, layers)) for inner in combinations(range(1, layers), stages - 1))
    found = cut_stages(layers, stages, stage_cost)
    assert worst(tuple(found)) == pytest.approx(min(every), rel=1e-12)
