"""What a bundle's kernels are measured on: routing, and numbers that host and device know without copying them back.

Every float buffer repeats one block of PERIOD random bfloat16 numbers, so that element i is known on the host as
block[i % PERIOD]. Python's standard library alone.
"""

from __future__ import annotations

import array
import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

PERIOD = 65521  # prime, so that rows of one buffer differ; made in a blink
_ONE_EXPONENT = 127


class Block:
    """PERIOD random bfloat16 numbers of a scale: bits for the device, values twice over for dot products."""

    def __init__(self, scale: float, seed: int) -> None:
        top = _ONE_EXPONENT + round(math.log2(scale))
        raw = array.array("H", random.Random(seed).randbytes(2 * PERIOD))
        # sign, one of four exponents, seven bits
        bits = [(r & 0x8000) | (top - (r >> 7 & 3)) << 7 | (r & 0x7F) for r in raw]
        self.bits = array.array("H", bits)
        once = array.array("f", array.array("I", (b << 16 for b in bits)).tobytes())
        self._values = once + once

    def row(self, start: int, length: int) -> Sequence[float]:
        """The values of elements start .. start + length of a buffer, length up to PERIOD."""
        at = start % PERIOD
        return self._values[at : at + length]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    """The sum of products in float64."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def float_of(bits: int) -> float:
    """The value of a bfloat16."""
    return float(array.array("f", array.array("I", [bits << 16]).tobytes())[0])


@dataclasses.dataclass(frozen=True)
class Routing:
    """Slots in the order of experts. slot_order: row -> slot.  expert_start: first row of each, and the end.

    experts: of each token, the routed ones.  row_of_slot: slot -> row.
    """

    slot_order: list[int]
    expert_start: list[int]
    experts: list[list[int]]
    row_of_slot: list[int]

    def tiles(self, tile_rows: int) -> tuple[list[int], list[int]]:
        """(expert, first row) of each tile, then -1 up to the number that any routing of so many slots fits in."""
        found = [
            (e, row)
            for e, (start, end) in enumerate(zip(self.expert_start, self.expert_start[1:], strict=False))
            for row in range(start, end, tile_rows)
        ]
        slots = len(self.slot_order)
        found += [(-1, 0)] * (min(slots, slots // tile_rows + len(self.expert_start) - 1) - len(found))
        return [e for e, _ in found], [row for _, row in found]


def route(sizes: Mapping[str, Any], tokens: int, log_use: Sequence[float], seed: int) -> Routing:
    """Gumbel top-k over the logarithm of each expert's use; shared experts get a slot of every token.

    sizes: E, K, S.
    """
    rng, top_k, shared = random.Random(seed), sizes["K"], sizes["S"]
    experts = []
    for _ in range(tokens):
        scores = [use - math.log(-math.log(rng.random() or 0.5)) for use in log_use]
        experts.append(sorted(range(len(scores)), key=lambda e: -scores[e])[:top_k])
    of_slot = [e for chosen in experts for e in (*chosen, *range(sizes["E"], sizes["E"] + shared))]
    order = sorted(range(len(of_slot)), key=lambda slot: (of_slot[slot], slot))
    counts = [0] * (sizes["E"] + shared)
    for e in of_slot:
        counts[e] += 1
    start = [0]
    for n in counts:
        start.append(start[-1] + n)
    row_of_slot = [0] * len(order)
    for row, slot in enumerate(order):
        row_of_slot[slot] = row
    return Routing(order, start, experts, row_of_slot)
