"""Integer shares: how many units each rank holds in each layer, and where a pipeline is cut."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np


def fewest_makespan(num_units: int, cost_per_unit: np.ndarray) -> float:
    """The least t such that `num_units` whole units can be dealt with no rank above t. Exact.

    Args:
        cost_per_unit: f64[R], time of one unit on each rank, above 0.

    Returns:
        t, 0.0 for no units. Every t' < t has sum(floor(t' / cost)) < num_units, which is what a verifier checks.
    """
    if num_units <= 0:
        return 0.0
    counts = np.floor(num_units / np.sum(1 / cost_per_unit) / cost_per_unit).astype(int)
    latest = float(np.max(counts * cost_per_unit))
    heap = [((n + 1) * c, rank) for rank, (n, c) in enumerate(zip(counts, cost_per_unit, strict=True))]
    heapq.heapify(heap)
    for _ in range(num_units - int(counts.sum())):
        latest, rank = heap[0]
        counts[rank] += 1
        heapq.heapreplace(heap, ((counts[rank] + 1) * cost_per_unit[rank], rank))
    return max(latest, float(np.max(counts * cost_per_unit)))


def deal_units(num_units: int, num_layers: int, caps: np.ndarray, target: np.ndarray, rotate: bool) -> np.ndarray:
    """Deals the units of `num_layers` layers so that running totals follow `target` and no share exceeds its cap.

    The left-over units of a layer go to the ranks that are furthest behind their target: 36 heads over 8 give
    5,5,5,5,4,4,4,4, then 4,4,4,4,5,5,5,5. Without rotation every layer is dealt like the first.

    Args:
        caps: i64[R], most units of one layer on each rank; their sum is at least num_units.
        target: f64[R], wanted proportions, not negative, with a positive sum.

    Returns:
        i64[num_layers, R]; every row sums to num_units.
    """
    ideal = num_units * target / target.sum()
    held = np.zeros(len(caps))
    out = np.zeros((num_layers, len(caps)), dtype=np.int64)
    for layer in range(num_layers):
        behind = ideal * (layer + 1 if rotate else 1) - (held if rotate else 0)
        row = np.clip(np.floor(np.minimum(behind, ideal) + 1e-9), 0, caps).astype(np.int64)
        while (left := num_units - int(row.sum())) > 0:
            order = np.argsort(row - behind, kind="stable")
            room = order[row[order] < caps[order]][:left]
            row[room] += 1
        out[layer] = row
        held += row
    return out


def cut_by_sums(
    sums: Sequence[np.ndarray], ends: Sequence[float], allowed: Sequence[np.ndarray]
) -> tuple[float, list[int]]:
    """As cut_stages, for costs that are sums over layers, and stages that may not hold some runs of layers.

    Args:
        sums: per stage f64[L + 1], the cost of the layers before each boundary. ends: what a stage costs besides.
        allowed: per stage bool[L + 1, L + 1], whether it may hold layers [start, end).

    Returns:
        the least greatest cost, infinite where no cut is allowed, and its boundaries. Cost: O(stages * L^2), in numpy.
    """
    best, back = np.full(len(sums[0]), np.inf), []
    best[0] = -np.inf
    for total, end, may in zip(sums, ends, allowed, strict=True):
        cost = np.where(may, np.maximum(best[:, None], total[None, :] - total[:, None] + end), np.inf)  # [start, end]
        cost[np.tril_indices(len(total))] = np.inf  # a stage holds a layer at least
        back.append(np.argmin(cost, axis=0))
        best = cost.min(axis=0)
    cuts = [len(best) - 1]
    for chosen in reversed(back):
        cuts.append(int(chosen[cuts[-1]]))
    return float(best[-1]), cuts[::-1]


def cut_stages(num_layers: int, num_stages: int, stage_cost: Callable[[int, int, int], float]) -> list[int]:
    """The cut of layers into consecutive non-empty stages with the least greatest cost, by dynamic programming.

    Args:
        stage_cost: (stage, start, end) -> finite cost of layers [start, end) on that stage.

    Returns:
        num_stages + 1 boundaries, from 0 to num_layers. Cost: O(num_stages * num_layers^2) calls.
    """
    best = {0: -np.inf}
    back: list[dict[int, int]] = []
    for stage in range(num_stages):
        reached: dict[int, float] = {}
        chosen: dict[int, int] = {}
        last = num_stages - stage - 1
        ends = range(stage + 1, num_layers - last + 1) if last else (num_layers,)
        for end in ends:
            options = ((max(cost, stage_cost(stage, start, end)), start) for start, cost in best.items() if start < end)
            reached[end], chosen[end] = min(options)
        best = reached
        back.append(chosen)
    cuts = [num_layers]
    for chosen in reversed(back):
        cuts.append(chosen[cuts[-1]])
    return cuts[::-1]
