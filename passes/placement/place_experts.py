"""Places the experts of every MoE layer: the best of several methods on scenarios, never worse than EPLB on the
trace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moec.passes.placement.balance import (
    even_out_shares,
    load_bound,
    one_hot,
    pack_heaviest_first,
    replicate_and_pack,
    residency_by_milp,
    swap_descent,
)
from moec.passes.placement.routing import scenarios

NUM_SCENARIOS = 16
MILP_BINARIES = 128
"""Largest E * G that is worth a MILP: above it the incumbent within the node limit was worse than EPLB's."""
CLEAR_GAIN = 5e-3
"""A method replaces a simpler one only where it wins by this much: smaller differences are noise."""
ENOUGH = 5e-4
"""Swaps stop within this much of the lower bound."""


@dataclass(frozen=True)
class ExpertPlacement:
    """Where experts live.

    Args:
        resident: bool[M, E, G]; share: f64[M, E, G], token shares for the trace; bound: f64[M], least possible greatest
            load per layer as a fraction of the layer's slots; method: per layer, which method won.
    """

    resident: np.ndarray
    share: np.ndarray
    bound: np.ndarray
    method: tuple[str, ...]


def place_experts(
    popularity: np.ndarray, num_groups: int, spare_slots: int = 1, num_slots: int = 8192, use_milp: bool = True
) -> ExpertPlacement:
    """Residency and token shares of M layers.

    Args:
        popularity: f64[M, E], rows sum to 1.
        num_groups, spare_slots: G, and slots per group above ceil(E / G), which hold copies.
        num_slots: routed slots of the batch that scenarios resample.
    """
    layers = [_place_layer(row, num_groups, spare_slots, num_slots, use_milp, i) for i, row in enumerate(popularity)]
    shares, bounds, methods = zip(*layers, strict=True)
    # the heaviest and the fullest group moves on from layer to layer, so that memory and heat even out
    share = np.stack([np.roll(one, layer, axis=1) for layer, one in enumerate(shares)])
    return ExpertPlacement(share > 0, share, np.array(bounds), methods)


def _place_layer(
    load: np.ndarray, num_groups: int, spare_slots: int, num_slots: int, use_milp: bool, seed: int
) -> tuple[np.ndarray, float, str]:
    num_experts = len(load)
    slots = min(-(-num_experts // num_groups) + spare_slots, num_experts)
    if num_groups == 1:
        return np.ones((num_experts, 1)), float(load.sum()), "one group"
    may_come, judges = np.split(scenarios(load, num_slots, 2 * NUM_SCENARIOS, seed), 2)
    if not spare_slots:
        return _place_without_copies(load, num_groups, slots, may_come, judges)
    return _place_with_copies(load, num_groups, slots, may_come, use_milp)


def _place_without_copies(
    load: np.ndarray, num_groups: int, slots: int, may_come: np.ndarray, judges: np.ndarray
) -> tuple[np.ndarray, float, str]:
    """Scenarios `may_come` are fitted, `judges` decide: a placement that only fits its own scenarios does not win."""
    bound = load_bound(load, num_groups, False, slots)
    if len(load) <= num_groups:
        return one_hot(np.arange(len(load)), num_groups), bound, "one expert a group"
    packed = pack_heaviest_first(load, num_groups)
    swapped = swap_descent(load[None], packed, num_groups, enough=bound * (1 + ENOUGH))
    robust = swap_descent(np.vstack([load[None], may_come]), swapped, num_groups, 60)
    ladder = {"eplb": packed, "swap": swapped, "swap on scenarios": robust}
    score = {name: float((judges @ one_hot(a, num_groups)).max(axis=1).mean()) for name, a in ladder.items()}
    on_trace = {name: float(np.bincount(a, load, num_groups).max()) for name, a in ladder.items()}
    better = on_trace["swap"] < on_trace["eplb"] * (1 - CLEAR_GAIN) and score["swap"] <= score["eplb"]
    kept = "swap" if better else "eplb"
    if (
        score["swap on scenarios"] < score[kept] * (1 - 2 * CLEAR_GAIN)
        and on_trace["swap on scenarios"] <= on_trace["eplb"]
    ):
        kept = "swap on scenarios"
    return one_hot(ladder[kept], num_groups), bound, kept


def _place_with_copies(
    load: np.ndarray, num_groups: int, slots: int, may_come: np.ndarray, use_milp: bool
) -> tuple[np.ndarray, float, str]:
    bound = load_bound(load, num_groups, True, slots)
    even = replicate_and_pack(load, num_groups, slots)
    ladder = {"eplb + shares": fill_slots(even > 0, load, slots)}
    if use_milp and load.size * num_groups <= MILP_BINARIES:
        solved = residency_by_milp(load, num_groups, slots)
        if solved is not None:
            share, proven = solved
            bound = max(bound, proven)
            ladder["milp + shares"] = fill_slots(share > 1e-9, load, slots)
    kept, kept_score = "eplb + shares", np.inf
    few = may_come[: NUM_SCENARIOS // 2]
    for name, resident in ladder.items() if len(ladder) > 1 else ():
        score = float(np.mean([even_out_shares(row, resident)[1] for row in few]))
        if score < kept_score * (1 - CLEAR_GAIN):
            kept, kept_score = name, score
    share, greatest = even_out_shares(load, ladder[kept])
    share = np.where(
        ladder[kept], np.maximum(share, 1e-6), 0.0
    )  # a resident copy always serves a little: share > 0 marks it
    return share / share.sum(axis=1, keepdims=True), min(bound, greatest), kept


def fill_slots(resident: np.ndarray, load: np.ndarray, slots: int) -> np.ndarray:
    """Fills empty slots with the hottest expert per copy that the group does not hold yet."""
    resident = resident.copy()
    for group in np.argsort(resident.sum(axis=0), kind="stable"):
        while resident[:, group].sum() < min(slots, len(load)):
            per_copy = np.where(resident[:, group], -1.0, load / resident.sum(axis=1))
            resident[np.argmax(per_copy), group] = True
    return resident


def imbalance(share: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """f64[M]: greatest over mean group load of each layer."""
    loads = np.einsum("me,meg->mg", popularity, share)
    return loads.max(axis=1) / np.maximum(loads.mean(axis=1), 1e-300)


def resolve_shares(resident: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """f64[M, E, G]: token shares solved again for another trace with residency unchanged; what the runtime does per
    window."""
    return np.stack([even_out_shares(row, held)[0] for row, held in zip(popularity, resident, strict=True)])
