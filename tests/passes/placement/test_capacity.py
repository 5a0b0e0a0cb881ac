"""Capacity and pre-drop: the decision, and the prediction against counting it."""

from __future__ import annotations

import numpy as np
import pytest

from moec.passes.hardware.errors import PlacementError
from moec.passes.placement.capacity import check_factor, keep_slots, predict_drops
from moec.passes.placement.place_experts import place_experts
from moec.passes.placement.routing import sample_trace, zipf_logits


def test_lowest_scores_are_dropped_first():
    owner = np.array([[0, 1], [0, 1], [0, 0]])
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.6]])
    keep = keep_slots(owner, scores, num_owners=2, factor=1.0)  # capacity 3 of 4 slots of owner 0
    assert keep.tolist() == [[True, True], [False, True], [True, True]]
    late = keep_slots(owner, scores, 2, 1.0, by_score=False)
    assert late.tolist() == [[True, True], [True, True], [True, False]]


@pytest.mark.parametrize("seed", range(5))
def test_no_owner_exceeds_its_capacity(seed):
    rng = np.random.default_rng(seed)
    owner, scores = rng.integers(0, 8, (64, 2)) ** 2 // 8, rng.random((64, 2))
    keep = keep_slots(owner, scores, 8, 1.25)
    counts = np.bincount(owner[keep], minlength=8)
    assert counts.max() <= int(np.ceil(1.25 * 128 / 8))
    untouched = np.bincount(owner.ravel(), minlength=8) <= 20
    assert (counts == np.bincount(owner.ravel(), minlength=8))[untouched].all()


@pytest.mark.parametrize("factor", [1.0, 1.25, 2.0])
def test_prediction_matches_counting(factor):
    """Predicted from popularity, counted on 20 sampled batches: within 1 point of slots (sampling noise of the count
    is 0.3)."""
    tokens, top_k, experts, groups = 512, 2, 16, 8
    logits = zipf_logits(1, experts, 0.8, seed=0)
    popularity = sample_trace(logits, top_k, 200_000, 1).popularity()
    placed = place_experts(popularity, groups, spare_slots=0)
    predicted = predict_drops(popularity, placed.share, tokens * top_k, factor)
    per_expert = per_device = 0.0
    for seed in range(20):
        loads = sample_trace(logits, top_k, tokens, seed + 10).counts[0]
        per_expert += np.maximum(loads - factor * tokens * top_k / experts, 0).sum() / tokens / top_k / 20
        per_device += (
            np.maximum(loads @ placed.share[0] - factor * tokens * top_k / groups, 0).sum() / tokens / top_k / 20
        )
    assert predicted.per_expert == pytest.approx(per_expert, abs=0.01)
    assert predicted.per_device == pytest.approx(per_device, abs=0.01)
    assert predicted.per_device < predicted.per_expert


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_factor(factor):
    with pytest.raises(PlacementError, match=r"capacity .*: expected a factor above 0"):
        check_factor(factor)
