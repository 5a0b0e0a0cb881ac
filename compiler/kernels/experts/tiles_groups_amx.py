"""AMX tiles over codes below 8 bits and rows of integers: the next codes become tiles while these are multiplied.

A tile that is loaded soon after its bytes were stored waits for them to reach the cache, and a tile that is stored
waits for its products. So a k step is decoded two steps ahead of its product into a ring of four, and the sums of a
group are put down when the next group's products are under way.

int16 rows are 256 * high + low: with up to 8 of them both planes are rows of one tile, with up to 16 there are two.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.codes import INT8_STEP, UNIT_BYTES
from moec.compiler.kernels.experts.decode import Decoder
from moec.compiler.kernels.experts.layout import PANEL
from moec.compiler.kernels.experts.tiles import Step
from moec.compiler.kernels.experts.tiles_amx import TILE_ROWS, TileConfig
from moec.compiler.kernels.experts.tiles_codes import (
    TILES_AHEAD_BYTES,
    Flush,
    block_ahead,
    from_planes,
)
from moec.compiler.kernels.experts.tiles_ring import AHEAD, STEP_BYTES, Ahead, Ring
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.flow import when

_LANES = 16
PRODUCTS, PARTS = 2 * TILE_ROWS * PANEL, 2  # numbers of a part of a k step; most parts


@dataclasses.dataclass(frozen=True)
class _Block:
    """Up to 16 rows of a step: their first, their number (i64), their first element in `a`; tiles of rows: 1 or 2."""

    low: Any
    rows: Any
    a_at: Any
    tiles: int


class GroupTiles:
    """products: i32[PARTS * PRODUCTS], where C is put; planes of bytes of the rows: 1 or 2."""

    def __init__(self, decoder: Decoder, planes: int, config: TileConfig, ring: Ring, products: Any) -> None:
        self._decoder, self._codes, self._planes = decoder, decoder.codes, planes
        self._config, self._ring, self._products = config, ring, products
        self._parts = 2 if decoder.codes.is_short else 1  # products of a k step: one for each of its groups

    def step(self, step: Step) -> None:
        """One step, 16 rows at a time."""
        with T.serial(T.floordiv(step.rows + (TILE_ROWS - 1), TILE_ROWS)) as n:
            low = ins.let(n * TILE_ROWS)
            count = ins.let(T.min(step.rows - low, TILE_ROWS))
            rows = T.Cast("int64", count)
            a_at = ins.let(T.Cast("int64", step.a_row + low) * step.a_depth + step.k_start * rows)

            def one(low: Any = low, count: Any = count, rows: Any = rows, a_at: Any = a_at) -> None:
                self._config.all_rows(self._planes * count, self._parts > 1)
                self._block(step, _Block(low, rows, a_at, 1))

            def two(low: Any = low, count: Any = count, rows: Any = rows, a_at: Any = a_at) -> None:
                self._config.all_rows(count, self._parts > 1)
                self._block(step, _Block(low, rows, a_at, 2))

            if self._planes == 1:
                one()
            else:
                when(2 * count <= TILE_ROWS, one, two)

    def _block(self, step: Step, block: _Block) -> None:
        codes = self._codes
        steps = codes.block // INT8_STEP
        num_blocks = ins.let(T.floordiv(step.k_blocks, codes.block // PANEL))
        last = ins.let(num_blocks * steps - 1)
        fetch = block_ahead(step, codes, num_blocks, TILES_AHEAD_BYTES)
        self._clear(step, block)
        for number in range(AHEAD):
            self._decode(step, ins.let(T.min(T.int32(number), last)), None)
        groups = codes.groups_per_block
        with T.serial(num_blocks) as b:
            ahead = fetch(b)
            for s in range(steps):
                number = ins.let(T.Cast("int32", b) * steps + s)
                for part in range(self._parts):
                    if codes.group and (part or s == 0):  # a group begins: what the one before it came to is put down
                        self._put_down(block, (part - 1) % self._parts)
                        self._zero(block)
                    self._multiply(step, block, number, part)
                    if part + 1 < self._parts:
                        when(b > 0, functools.partial(self._flush, step, block, b - 1, part))
                size = codes.code_bytes // steps
                start, end = codes.block_head_bytes + s * size if s else 0, codes.block_head_bytes + (s + 1) * size
                self._decode(step, ins.let(T.min(number + AHEAD, last)), (ahead + start, end - start))
            if codes.group:
                when(b > 0, functools.partial(self._flush, step, block, b - 1, groups - 1))
        for part in range(self._parts - 1):
            self._flush(step, block, num_blocks - 1, part)
        self._put_down(block, self._parts - 1)
        self._flush(step, block, num_blocks - 1 if codes.group else None, self._parts - 1)

    def _clear(self, step: Step, block: _Block) -> None:
        self._zero(block)
        if self._codes.group:
            with T.serial(block.rows * (PANEL // _LANES)) as v:
                at = (T.Cast("int64", block.low) * (PANEL // _LANES) + v) * _LANES + step.out_at
                T.buffer_store(step.out, T.broadcast(T.float32(0), _LANES), [T.ramp(at, 1, _LANES)])

    def _zero(self, block: _Block) -> None:
        for tile in range(2 * block.tiles):
            ins.tile_zero(tile)

    def _multiply(self, step: Step, block: _Block, number: Any, part: int) -> None:
        at = ins.let(block.a_at + T.Cast("int64", number) * (block.rows * INT8_STEP))
        slot = self._ring.slot(number)
        for n in range(block.tiles):
            place = at + (block.rows * (PANEL * n) + part * (PANEL // 2))  # of 16 bits: parts are of two planes
            ins.tile_load(4 + n, T.address_of(step.a[place]), T.int64(UNIT_BYTES))
        self._ring.load(slot + part * (STEP_BYTES // 2))
        for n in range(block.tiles):
            for half in range(2):
                ins.tile_dot_int8(2 * n + half, 4 + n, 6 + half)

    def _decode(self, step: Step, number: Any, ahead: Ahead) -> None:
        """Codes of a k step -> its slot of the ring."""
        codes = self._codes
        steps = codes.block // INT8_STEP
        block, inner = (T.Cast("int64", f(number, steps)) for f in (T.floordiv, T.floormod))
        at = step.w_at + block * codes.block_bytes + inner * (codes.code_bytes // steps) + codes.block_head_bytes
        at, slot = ins.let(at), self._ring.slot(number)
        self._ring.decode(
            step, codes, at, slot, lambda j, words, half: [self._decoder.quad(j, words)], INT8_STEP, ahead
        )

    def _put_down(self, block: _Block, part: int) -> None:
        """C -> the products of a part, [plane][row][32]."""
        for n in range(block.tiles):
            for half in range(2):
                place = block.rows * (PANEL * n) + (part * PRODUCTS + half * _LANES)
                ins.tile_store(2 * n + half, T.address_of(self._products[place]), T.int64(PANEL * 4))

    def _flush(self, step: Step, block: _Block, number: Any, part: int) -> None:
        """Products of a part of a block (None: of all k) -> out."""
        codes, group = self._codes, 0 if number is None else number * self._parts + part
        at = step.panel_at
        if number is not None:
            at = step.w_at + (T.Cast("int64", number) * codes.block_bytes + part * PANEL * codes.scale_bytes)
        flush = Flush(step, codes, ins.let(at), group, _LANES, part, unsigned=True)
        with T.serial(block.rows) as r:
            planes = [
                ins.let(T.Cast("int64", r) * PANEL + (block.rows * (PANEL * n) + part * PRODUCTS))
                for n in range(self._planes)
            ]
            products = [
                from_planes([self._products[T.ramp(p + c, 1, _LANES)] for p in planes], _LANES)
                for c in range(0, PANEL, _LANES)
            ]
            flush.row(block.low + r, products, number is None)
