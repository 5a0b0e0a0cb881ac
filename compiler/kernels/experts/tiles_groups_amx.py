"""AMX tiles over codes below 8 bits and rows of integers: the next codes become tiles while these are multiplied.

A tile that is loaded soon after its bytes were stored waits for them to reach the cache, and a tile that is stored
waits for its products. So a k step is decoded two steps ahead of its product into a ring of four, and the sums of a
group are put down when the next group's products are under way; so through all panels of a step, without a pause.

int16 rows are 256 * high + low: with up to 8 of them both planes are rows of one tile, with up to 16 there are two.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.codes import INT8_STEP, UNIT_BYTES, Codes
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
from moec.compiler.kernels.template.flow import Scalar, when

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
        codes, num_blocks = self._codes, ins.let(T.floordiv(step.k_blocks, self._codes.block // PANEL))
        self._clear(step, block)
        upcoming = _Upcoming(step, codes, num_blocks)
        for number in range(AHEAD):
            self._decode(step, upcoming, T.int32(number), number % (codes.block // INT8_STEP), None)
        done = Scalar("int32", 0)  # blocks, of all panels

        def panel(one: Step) -> None:
            fetch = block_ahead(one, codes, num_blocks, TILES_AHEAD_BYTES)
            with T.serial(num_blocks) as b:
                self._one(one, block, _Place(b, num_blocks, ins.let(done.value)), upcoming, fetch.at(b))
                done.set(done.value + 1)

        step.each_panel(panel)
        last = step.panel(step.panels - 1)
        for part in range(self._parts - 1):
            self._flush(last, block, num_blocks - 1, part)
        self._put_down(block, self._parts - 1)
        self._flush(last, block, num_blocks - 1, self._parts - 1)

    def _one(self, step: Step, block: _Block, place: _Place, upcoming: _Upcoming, ahead: Any) -> None:
        """One block of k. What the group before it came to is put down when this one begins, and flushed meanwhile."""
        codes = self._codes
        steps = codes.block // INT8_STEP
        for s in range(steps):
            number = ins.let(place.done * steps + s)
            for part in range(self._parts):
                if codes.group and (part or s == 0):
                    self._begin(block, part)
                elif not codes.group:
                    with T.If(place.number == 0), T.Then():
                        self._begin(block, part)
                self._multiply(step, block, ins.let(place.number * steps + s), self._ring.slot(number), part)
                if part + 1 < self._parts:
                    self._flush_before(step, block, place, part)
            size = codes.code_bytes // steps
            start, end = codes.block_head_bytes + s * size if s else 0, codes.block_head_bytes + (s + 1) * size
            self._decode(step, upcoming, number + AHEAD, (s + AHEAD) % steps, (ahead + start, end - start))
        self._flush_before(step, block, place, self._parts - 1)

    def _begin(self, block: _Block, part: int) -> None:
        """A group begins."""
        self._put_down(block, (part - 1) % self._parts)
        self._zero(block)

    def _flush_before(self, step: Step, block: _Block, place: _Place, part: int) -> None:
        """Products of a part of the block before this one, which may be the last of the panel before."""
        first = place.number == 0

        def flush() -> None:
            before = step.panel(T.int32(-1))
            w_at = ins.let(T.Select(first, before.w_at, step.w_at))
            panel_at = ins.let(T.Select(first, before.panel_at, step.panel_at))
            out_at = ins.let(T.Select(first, before.out_at, step.out_at))
            number = ins.let(T.Select(first, place.count, place.number) - 1)
            of = dataclasses.replace(step, w_at=w_at, panel_at=panel_at, out_at=out_at)
            self._flush(of, block, number, part)

        when((place.done > 0) if self._codes.group else (place.done > 0) & first, flush)

    def _clear(self, step: Step, block: _Block) -> None:
        self._zero(block)
        if self._codes.group:
            with T.serial(block.rows * T.Cast("int64", step.panels) * (PANEL // _LANES)) as v:
                at = (T.Cast("int64", block.low) * (PANEL // _LANES) + v) * _LANES + step.out_at
                T.buffer_store(step.out, T.broadcast(T.float32(0), _LANES), [T.ramp(at, 1, _LANES)])

    def _zero(self, block: _Block) -> None:
        for tile in range(2 * block.tiles):
            ins.tile_zero(tile)

    def _multiply(self, step: Step, block: _Block, number: Any, slot: Any, part: int) -> None:
        at = ins.let(block.a_at + T.Cast("int64", number) * (block.rows * INT8_STEP))
        for n in range(block.tiles):
            place = at + (block.rows * (PANEL * n) + part * (PANEL // 2))  # of 16 bits: parts are of two planes
            ins.tile_load(4 + n, T.address_of(step.a[place]), T.int64(UNIT_BYTES))
        self._ring.load(slot + part * (STEP_BYTES // 2))
        for n in range(block.tiles):
            for half in range(2):
                ins.tile_dot_int8(2 * n + half, 4 + n, 6 + half)

    def _decode(self, step: Step, upcoming: _Upcoming, number: Any, inner: int, ahead: Ahead) -> None:
        """Codes of the block's k step `inner`, the number-th of all -> its slot of the ring."""
        codes = self._codes
        steps = codes.block // INT8_STEP
        at = ins.let(upcoming.at.value + (inner * (codes.code_bytes // steps) + codes.block_head_bytes))
        slot = self._ring.slot(number)
        self._ring.decode(
            step, codes, at, slot, lambda j, words, half: [self._decoder.quad(j, words)], INT8_STEP, ahead
        )
        if inner + 1 == steps:
            upcoming.advance()

    def _put_down(self, block: _Block, part: int) -> None:
        """C -> the products of a part, [plane][row][32]."""
        for n in range(block.tiles):
            for half in range(2):
                place = block.rows * (PANEL * n) + (part * PRODUCTS + half * _LANES)
                ins.tile_store(2 * n + half, T.address_of(self._products[place]), T.int64(PANEL * 4))

    def _flush(self, step: Step, block: _Block, number: Any, part: int) -> None:
        """Products of a part of a block, or of all k where a column has one scale, -> out."""
        codes = self._codes
        at, group = step.panel_at, T.int32(0)
        if codes.group:
            at = step.w_at + (T.Cast("int64", number) * codes.block_bytes + part * PANEL * codes.scale_bytes)
            group = number * self._parts + part
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
            flush.row(block.low + r, products, not codes.group)


@dataclasses.dataclass(frozen=True)
class _Place:
    """A block of a panel: its number there, the panel's number of blocks, and how many of all panels were before."""

    number: Any
    count: Any
    done: Any


class _Upcoming:
    """The block whose codes become tiles next, through all panels of a step; at: its first byte. Ends at the last."""

    def __init__(self, step: Step, codes: Codes, num_blocks: Any) -> None:
        self._codes, self._num_blocks = codes, num_blocks
        self._beyond = ins.let(step.side.panel_elements - T.Cast("int64", num_blocks - 1) * codes.block_bytes)
        self.at, self._block = Scalar("int64", step.w_at), Scalar("int32", 0)
        self._left = Scalar("int32", step.panels * num_blocks - 1)

    def advance(self) -> None:
        """To the next."""
        last = T.Bind(self._block.value + 1 == self._num_blocks)
        more = T.Bind(self._left.value > 0)
        stride = T.Select(last, self._beyond, T.int64(self._codes.block_bytes))
        self.at.set(self.at.value + T.Select(more, stride, T.int64(0)))
        self._block.set(T.Select(last, T.int32(0), self._block.value + 1))
        self._left.set(self._left.value - 1)
