"""Divides a number of bytes among experts so that the sum of their errors is least.

Every expert starts in its smallest format; the exchange that takes off most error per byte comes next, while it fits.
Formats that a mixture of a smaller and a larger one would beat are left out first, so that each exchange is better than
those after it: the result is the best one up to the last exchange that did not fit.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from moec.passes.ir.formats import FormatError, WeightFormat
from moec.passes.quantising.sensitivity import ExpertCost


def choose(costs: Sequence[ExpertCost], formats: Sequence[WeightFormat], num_bytes: float) -> list[WeightFormat]:
    """The format of each expert. Raises: FormatError: the smallest formats together need more bytes, or none fits."""
    paths = [_path(c) for c in costs]
    at = [0] * len(paths)
    left = num_bytes - sum(path[0][0] for path in paths)
    if left < 0:
        least = num_bytes - left
        raise FormatError(
            f"the experts need at least {least / 1e6:.1f} MB in the smallest formats that fit them, "
            f"{num_bytes / 1e6:.1f} MB are left for them; give more bytes"
        )
    exchanges = [(-_gain(path, 0), i) for i, path in enumerate(paths) if len(path) > 1]
    heapq.heapify(exchanges)
    while exchanges:
        _, i = heapq.heappop(exchanges)
        path, now = paths[i], at[i]
        price = path[now + 1][0] - path[now][0]
        if price > left:
            continue
        left -= price
        at[i] = now + 1
        if now + 2 < len(path):
            heapq.heappush(exchanges, (-_gain(path, now + 1), i))
    return [formats[path[now][2]] for path, now in zip(paths, at, strict=True)]


def _gain(path: list[tuple[int, float, int]], now: int) -> float:
    """Error taken off per byte by the exchange to the next format."""
    return (path[now][1] - path[now + 1][1]) / (path[now + 1][0] - path[now][0])


def _path(cost: ExpertCost) -> list[tuple[int, float, int]]:
    """(bytes, error, format) on the lower convex hull, rising in bytes. Raises: FormatError: no format fits."""
    found = sorted((*option, i) for i, option in enumerate(cost.options) if option is not None)
    if not found:
        raise FormatError(f"layer {cost.layer}, expert {cost.expert}: no format divides its widths")
    path: list[tuple[int, float, int]] = []
    for point in found:
        if path and (point[0] == path[-1][0] or point[1] >= path[-1][1]):
            continue
        while len(path) > 1 and _gain([path[-2], point], 0) >= _gain(path, len(path) - 2):
            path.pop()
        path.append(point)
    return path


def together(costs: Sequence[ExpertCost]) -> list[ExpertCost]:
    """One cost for each layer, for all of its experts in one format."""
    layers: dict[int, list[ExpertCost]] = {}
    for cost in costs:
        layers.setdefault(cost.layer, []).append(cost)
    made = []
    for layer, some in layers.items():
        options = []
        for each in zip(*(c.options for c in some), strict=True):
            fitting = [o for o in each if o is not None]
            whole = len(fitting) == len(each)
            options.append((sum(o[0] for o in fitting), sum(o[1] for o in fitting)) if whole else None)
        made.append(ExpertCost(layer, -1, sum(c.values for c in some), tuple(options)))
    return made
