"""What rank 0 of a placed engine spends outside of kernels, operators and collectives, per step of its program.

Every function that the program calls is timed by itself; what is left of Engine.step is the runtime: telling the other
ranks what to do, cache places, inputs, going from step to step, and two reads of the clock for each of these calls.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from typing import Any

from moec.runtime.engine import Engine

_FUNCTION = re.compile(r"f\d+")


class Inside:
    """Seconds spent in, and number of, the calls of a program's functions."""

    def __init__(self, engine: Engine) -> None:
        self.seconds, self.calls = 0.0, 0
        for source in engine.executor._sources:
            for name, value in source.namespace.items():
                if _FUNCTION.fullmatch(name):
                    source.namespace[name] = self._timed(value)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        clock = time.perf_counter

        def run(*args: Any, **kwargs: Any) -> Any:
            before = clock()
            result = function(*args, **kwargs)
            self.seconds += clock() - before
            self.calls += 1
            return result

        return run

    def take(self) -> tuple[float, int]:
        """Both so far; they begin anew."""
        found, self.seconds, self.calls = (self.seconds, self.calls), 0.0, 0
        return found


def measure_rank(engine: Engine, batch: int, rounds: int) -> dict[str, float]:
    """Medians over decode steps of `batch` sequences on rank 0, in microseconds.

    -> {"steps": calls of the program, "step": Engine.step, "inside": of its functions, "outside": per call}
    """
    inside = Inside(engine)
    cache = engine.new_cache(batch, rounds + 4)
    slots = [cache.allocate() for _ in range(batch)]
    found: dict[str, list[float]] = {"steps": [], "step": [], "inside": [], "outside": []}
    for number in range(rounds + 1):
        inside.take()
        before = time.perf_counter()
        engine.step(cache, slots, [[1]] * batch)
        whole = time.perf_counter() - before
        seconds, calls = inside.take()
        if not number:
            continue  # warms up
        for name, value in zip(
            found, (calls, whole * 1e6, seconds * 1e6, (whole - seconds) * 1e6 / calls), strict=True
        ):
            found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}
