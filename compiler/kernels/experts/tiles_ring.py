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
from moec.compiler.kernels.experts.tiles_codes import decode_each, load_units, unit_groups
from moec.compiler.kernels.template import intrinsics as ins

_LANES = 16
_SLOTS = 4  # k steps of the ring
AHEAD = 2  # k steps between decoding and the product
STEP_BYTES = 2 * TILE_ROWS * UNIT_BYTES  # of a k step's two weight tiles, their rows in turn
ROW_PAIR = T.int64(2 * UNIT_BYTES)  # from one row of a weight tile to the next
RING_BYTES = _SLOTS * STEP_BYTES


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

    def decode(
        self, step: Step, codes: Codes, at: Any, slot: Any, rows: Callable[[int, list[Any], int], list[Any]], depth: int
    ) -> None:
        """Codes of `depth` k, which begin at `at` of the weights -> a slot.

        rows: number of a code, units of a half, the half -> rows of a tile, in the order of k.
        """
        for group in unit_groups(codes, depth):
            for half in range(2):
                words = load_units(step.w, at, group, half, 0, _LANES)

                def put(place: int, j: int, words: list[Any], half: int = half) -> None:
                    values = rows(j, words, half)
                    for n, value in enumerate(values):
                        byte = slot + (2 * (len(values) * place + n) + half) * UNIT_BYTES
                        ins.store_i32(T.address_of(self._tiles[byte]), value, _LANES)

                decode_each(group, words, put)
