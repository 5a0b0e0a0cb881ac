"""The bound of paired ratios: exact where it can be counted, honest where there are too few pairs."""

import math
import random

import pytest

from moec.compiler.tune.statistics import geometric_mean, paired_ratio


def test_median_and_bound_of_nine_pairs():
    """P(B(9, 1/2) <= 1) = 10/512, so the second and the eighth enclose the median with 96 %."""
    ratio = paired_ratio([(float(n), 10.0) for n in range(1, 10)])
    assert (ratio.median, ratio.low, ratio.high, ratio.pairs) == (0.5, 0.2, 0.8, 9)


def test_too_few_pairs_prove_nothing():
    for count in range(1, 6):
        ratio = paired_ratio([(1.0, 100.0)] * count)
        assert (ratio.low, ratio.high) == (0.0, math.inf)
    assert paired_ratio([(1.0, 100.0)] * 6).high < 1.0


def test_the_bound_holds_the_median_as_often_as_it_says():
    """2,000 draws from a skewed distribution of known median: coverage at least 95 % less three deviations (1.5 %)."""
    rng, held = random.Random(0), 0
    for _ in range(2000):
        ratio = paired_ratio([(math.exp(rng.expovariate(1.0)), 1.0) for _ in range(15)])
        held += ratio.low <= 2.0 <= ratio.high  # exp of the median ln 2
    assert held / 2000 > 0.935


def test_equal_candidates_are_rarely_called_faster():
    rng = random.Random(1)
    called = sum(
        paired_ratio([(rng.gauss(1, 0.1), rng.gauss(1, 0.1)) for _ in range(11)]).high < 1.0 for _ in range(2000)
    )
    assert called / 2000 < 0.04  # one side of 5 %, and three deviations


def test_empty_input():
    with pytest.raises(ValueError, match="no pairs"):
        paired_ratio([])
    with pytest.raises(ValueError, match="no values"):
        geometric_mean([])
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
