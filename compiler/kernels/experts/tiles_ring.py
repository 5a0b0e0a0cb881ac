"""A ring of weight tiles: k steps are decoded ahead of their products.

A tile that is loaded soon after its bytes were stored waits for them to reach the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.codes import UNIT_BYTES, Codes
from moec.compiler.kernels.experts.tiles import Step
from moec.compiler.kernels.experts.tiles_amx import TILE_ROWS
from moec.compiler.kernels.experts.tiles_codes import decode_each, load_units, prefetch_part, unit_groups
from moec.compiler.kernels.template import intrinsics as ins

_LANES = 16
_SLOTS = 4  # k steps of the ring
AHEAD = 2  # k steps between decoding and the product
STEP_BYTES = 2 * TILE_ROWS * UNIT_BYTES  # of a k step's two weight tiles, their rows in turn
ROW_PAIR = T.int64(2 * UNIT_BYTES)  # from one row of a weight tile to the next
RING_BYTES = _SLOTS * STEP_BYTES


Rows = Callable[[int, list[Any], int], list[Any]]
"""Number of a code, units of a half, the half -> rows of a tile, in the order of k."""
Ahead = tuple[Any, int] | None
"""A byte of the weights, a number of bytes."""


class Ring:
    """tiles: u8[RING_BYTES]."""

    def __init__(self, tiles: Any) -> None:
        self._tiles = tiles

    def slot(self, number: Any) -> Any:
        """Where a k step's tiles are."""
        return ins.let(T.Cast("int64", T.floormod(number, _SLOTS)) * STEP_BYTES)

    def load(self, slot: Any) -> None:
        """Tiles 6 and 7: the two weight tiles of a k step."""
        for half in range(2):
            ins.tile_load(6 + half, T.address_of(self._tiles[slot + half * UNIT_BYTES]), ROW_PAIR)

    def decode(self, step: Step, codes: Codes, at: Any, slot: Any, rows: Rows, depth: int, ahead: Ahead) -> None:
        """Codes of `depth` k, which begin at `at` of the weights -> a slot. ahead: what is asked for meanwhile."""
        groups = list(unit_groups(codes, depth))
        count = 2 * sum(len(group.codes) for group in groups)
        turns = iter(range(count))
        for group in groups:
            for half in range(2):
                words = load_units(step.w, at, group, half, 0, _LANES)

                def put(place: int, j: int, words: list[Any], half: int = half) -> None:
                    if ahead is not None:
                        prefetch_part(step, *ahead, next(turns), count)
                    values = rows(j, words, half)
                    for n, value in enumerate(values):
                        byte = slot + (2 * (len(values) * place + n) + half) * UNIT_BYTES
                        ins.store_i32(T.address_of(self._tiles[byte]), value, _LANES)

                decode_each(group, words, put)
