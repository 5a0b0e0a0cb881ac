"""Capacity: how many routed slots a factor drops before dispatch. Opt-in: it changes outputs.

A capacity factor c allows c times the mean load: of every expert (GShard's rule), or of every device, which bounds
what an all-to-all receives and lets an expert run over as long as its device has room. Weights are normalised over all
K chosen experts before the drop, so the share of a dropped expert is lost, not handed on. Which slots are dropped:
passes/ir/limit_ops.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moec.passes.hardware.errors import PlacementError


@dataclass(frozen=True)
class DropPrediction:
    """Expected part of routed slots that is dropped, from 0 to 1, by what the capacity is counted for."""

    per_expert: float
    per_device: float


def check_factor(factor: float) -> float:
    """The factor itself; raises PlacementError unless it is a positive finite number."""
    if not math.isfinite(factor) or factor <= 0:
        raise PlacementError(f"capacity {factor}: expected a factor above 0, for example 1.25")
    return factor


def predict_drops(popularity: np.ndarray, token_share: np.ndarray, num_slots: float, factor: float) -> DropPrediction:
    """Expected drops of a batch.

    Args:
        popularity: f64[M, E]; token_share: f64[M, E, G].
        num_slots: routed slots of one batch in one layer (tokens times K); loads vary about their means like Poisson
        counts.
        factor: capacity over mean load, above 0.
    """
    by_group = np.einsum("me,meg->mg", popularity, token_share)
    return DropPrediction(_overflow(popularity, num_slots, factor), _overflow(by_group, num_slots, factor))


def _overflow(fraction: np.ndarray, num_slots: float, factor: float) -> float:
    """Mean over layers of E[max(load - capacity, 0)] / num_slots, loads normal with variance equal to their mean."""
    mean = fraction * num_slots
    capacity = factor * num_slots / fraction.shape[1]
    deviation = np.sqrt(np.maximum(mean, 1e-12))
    z = (mean - capacity) / deviation
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    return float(np.sum(deviation * density + (mean - capacity) * below, axis=1).mean() / num_slots)
