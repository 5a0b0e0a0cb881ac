"""Traces: popularity, synthetic use, and traces of another model."""

from __future__ import annotations

import numpy as np
import pytest

from moec.passes.hardware.errors import PlacementError
from moec.passes.placement.routing import sample_trace, scenarios, trace_from_dict, zipf_logits, zipf_trace
from moec.passes.placement.zoo import zoo_shape

MIXTRAL = zoo_shape("mixtral-8x7b")


def test_sampled_slots_are_all_counted():
    counts = sample_trace(zipf_logits(3, 16, 0.8, 0), 2, 1000, 1).counts
    assert (counts.sum(axis=1) == 2000).all()
    assert (sample_trace(zipf_logits(1, 4, 0.8, 0), 4, 10, 1).counts == 10).all()  # top-k of all experts


def test_same_seed_same_trace():
    assert (zipf_trace(MIXTRAL, 0.4).counts == zipf_trace(MIXTRAL, 0.4).counts).all()


def test_scenarios_are_distributions_around_popularity():
    popularity = np.array([0.5, 0.3, 0.2])
    loads = scenarios(popularity, 100_000, 16, seed=0)
    np.testing.assert_allclose(loads.sum(axis=1), 1.0)
    np.testing.assert_allclose(
        loads[::2].mean(axis=0), popularity, atol=0.01
    )  # resampled only: 0.16 % standard deviation
    assert loads[1::2].std(axis=0).max() > 0.02  # drifted


def test_unused_layer_counts_as_even():
    trace = trace_from_dict({"counts": [[0] * 8] * 32}, MIXTRAL, "t.json")
    assert (trace.popularity() == 1 / 8).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected an object with 'counts'"),
        ({"counts": 3}, "expected an object with 'counts'"),
        ({"model": "grok-1", "counts": []}, "the trace is of model 'grok-1', the plan is for 'mixtral-8x7b'"),
        (
            {"counts": [[1] * 16] * 52},
            "the trace has 52 layers of 16 experts, mixtral-8x7b has 32 MoE layers of 8 experts",
        ),
        ({"counts": [[1] * 7] + [[1] * 8] * 31}, "32 layers of 7, 8 experts"),
        ({"counts": [[-1] + [1] * 7] * 32}, "counts must be numbers of at least 0"),
        ({"counts": [["many"] + [1] * 7] * 32}, "counts must be numbers of at least 0"),
        ({"counts": [[float("nan")] + [1] * 7] * 32}, "counts must be numbers of at least 0"),
    ],
)
def test_trace_of_another_model(data, message):
    with pytest.raises(PlacementError) as error:
        trace_from_dict(data, MIXTRAL, "t.json")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
