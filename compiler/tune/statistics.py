"""What paired measurements say: the median of ratios and a bound on it that assumes nothing about the noise."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Median of paired ratios and the bound that holds it with 95 % probability.

    Infinitely wide below 6 pairs: all of n signs agree by chance with probability 2 * 0.5**n.
    """

    median: float
    low: float
    high: float
    pairs: int


def paired_ratio(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """Of pairs (time, time of the incumbent), in any unit. Raises: ValueError: no pair.

    The bound is that of the sign test: order statistics of the ratios, exact for any distribution.
    Source: Conover, Practical Nonparametric Statistics, section 3.2.
    """
    if not pairs:
        raise ValueError("no pairs of times")
    ratios = sorted(a / b for a, b in pairs)
    cut = _order(len(ratios))
    if cut is None:
        return Ratio(statistics.median(ratios), 0.0, math.inf, len(ratios))
    return Ratio(statistics.median(ratios), ratios[cut], ratios[-1 - cut], len(ratios))


def _order(n: int) -> int | None:
    """Largest c such that the values of rank c and n-1-c (from 0) enclose the median with CONFIDENCE, None: none."""
    tail, cut = 0.0, None
    for c in range((n - 1) // 2):
        tail += math.comb(n, c) * 0.5**n
        if 2 * tail > 1 - CONFIDENCE:
            break
        cut = c
    return cut


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers. Raises: ValueError: none."""
    if not values:
        raise ValueError("no values")
    return math.exp(sum(map(math.log, values)) / len(values))
