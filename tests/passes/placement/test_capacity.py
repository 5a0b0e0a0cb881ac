"""Capacity: the predicted drops against counting them, and which factors are refused."""

from __future__ import annotations

import numpy as np
import pytest

from moec.passes.hardware.errors import PlacementError
from moec.passes.placement.capacity import check_factor, predict_drops
from moec.passes.placement.place_experts import place_experts
from moec.passes.placement.routing import sample_trace, zipf_logits


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
