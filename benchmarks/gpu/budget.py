"""The time of a run, shared out among its layers, so that each of them is measured before the time is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

FIRST = (1, 16, 128, 1024, 8192)
"""Token counts that come before all others: what there is time for is then spread over the whole range."""


class Budget:
    """Each layer gets an equal part of what is left when it begins; what one does not use is left to the others.

    seconds: for all.  layers: how many there are.  clock: seconds that only grow.
    """

    def __init__(self, seconds: float, layers: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._layers = clock, layers
        self._ends = clock() + seconds
        self._part_ends = self._ends

    def begin(self) -> bool:
        """A layer begins; False: the time is over, it should not."""
        now = self._clock()
        left = self._ends - now
        self._part_ends = now + left / max(self._layers, 1)
        self._layers -= 1
        return left > 0

    def over(self) -> bool:
        """Whether the layer's part is used up."""
        return self._clock() >= self._part_ends


def in_order(tokens: Iterable[int]) -> list[int]:
    """Those of FIRST, then the others, each rising."""
    return sorted(tokens, key=lambda n: (n not in FIRST, n))
