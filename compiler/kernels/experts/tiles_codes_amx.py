"""AMX tiles over quantised weights: codes become tiles in the first-level cache while the tile unit multiplies.

int8 rows meet unsigned codes (tdpbsud); 8-bit codes are loaded as they lie. bf16 rows meet the numbers of the codes,
group by group, where one block of rows is all there is; where several steps share a panel, the first turns it into
scaled bf16 numbers once (one rounding to bf16 more) and the steps multiply those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.codes import BF16_STEP, INT8_STEP, UNIT_BYTES, Codes
from moec.compiler.kernels.experts.layout import PANEL
from moec.compiler.kernels.experts.plan import Plan
from moec.compiler.kernels.experts.tiles import Result, Step
from moec.compiler.kernels.experts.tiles_affine_amx import AFFINE_TEXT, Affine
from moec.compiler.kernels.experts.tiles_amx import TILE_ROWS, RowBlocks, TileConfig, multiply, store_tiles
from moec.compiler.kernels.experts.tiles_codes import (
    Flush,
    block_ahead,
    decode_each,
    decoders,
    keeps_integers,
    load_units,
    prefetch,
    unit_groups,
)
from moec.compiler.kernels.experts.tiles_codes_vector import DOT_INT8, vector_code_tiles
from moec.compiler.kernels.experts.tiles_exponents_amx import EXPONENTS_TEXT, Exponents, ExponentTiles
from moec.compiler.kernels.experts.tiles_groups_amx import PARTS, PRODUCTS, GroupTiles
from moec.compiler.kernels.experts.tiles_ring import RING_BYTES, ROW_PAIR, STEP_BYTES, Ring
from moec.compiler.kernels.experts.tiles_vector import DOT_BF16
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.flow import switch, when

_LANES = 16
_UNROLLED_STEPS = 4
# so many rows are multiplied in vector registers: no tile has to be made, and weights stream at a higher rate (BYTES:
# int8 rows, codes of 8 bits; STEP: of fewer bits in groups of one k step; SHORT: int16 rows, groups of half a k step)
FEW_ROWS, FEW_ROWS_BYTES, FEW_ROWS_INT8, FEW_ROWS_STEP = 1, 8, 1, 4
FEW_ROWS_INT16, FEW_ROWS_THREE_BITS, FEW_ROWS_SHORT = 2, 1, 3


class AmxCodeTiles:
    """Tiles on the AMX unit; see moec.compiler.kernels.experts.tiles."""

    between: ClassVar[bool] = True

    def __init__(self, plan: Plan) -> None:
        self._plan, self._int8 = plan, plan.int8
        self._decoders = decoders(plan, _LANES, native=True)
        self._few = vector_code_tiles(plan, DOT_INT8 if plan.int8 else DOT_BF16, integers=True)

    def text(self, plan: Plan) -> str:
        """LLVM IR of the decoders and of scaling."""
        return self._few.text(plan) + AFFINE_TEXT + EXPONENTS_TEXT

    def begin(self) -> None:
        """Tile configuration, two steps of decoded tiles, a place for C, and for a panel of numbers."""
        self._config = TileConfig()
        self._ring = T.alloc_buffer((RING_BYTES,), "uint8", scope="local", align=64)
        self._c = T.alloc_buffer(
            (3 * TILE_ROWS * PANEL,), "int32" if self._int8 else "float32", scope="local", align=64
        )
        depth = max(self._plan.depth_up, self._plan.down_depth_chunk)
        if self._plan.splits:
            self._integers = T.alloc_buffer((PARTS * PRODUCTS,), "int32", scope="local", align=64)
        bytes_each = 1 if self._int8 else 2
        self._panel = T.alloc_buffer((depth * PANEL * bytes_each,), "uint8", scope="local", align=64)

    def end(self) -> None:
        """Leaves the tile unit in its initial state."""
        ins.tile_release()

    def step(self, step: Step) -> None:
        """One step of 1 to 48 rows."""
        codes = step.side.coded
        if step.side.planes == 2:
            pipe = self._pipe(codes, self._integers)
            usual = FEW_ROWS_THREE_BITS if codes.bits == 3 else FEW_ROWS_INT16
            few_rows = FEW_ROWS_SHORT if codes.is_short else usual
            few = lambda: self._by_rows(step, few_rows, lambda: pipe.step(step))  # noqa: E731
            when(step.split, few, lambda: self._many(step))
            return
        if codes.bits == 8:
            few_rows = FEW_ROWS_BYTES if self._int8 else 0
        else:
            of_bytes = FEW_ROWS_STEP if codes.group == INT8_STEP else FEW_ROWS_INT8
            few_rows = of_bytes if self._int8 else FEW_ROWS
        self._by_rows(step, few_rows, lambda: self._many(step))

    def value(self, result: Result, row: Any, column: int, lanes: int) -> Any:
        """Integers get their scale here."""
        codes = result.side.coded
        if not keeps_integers(codes):
            return result.out[result.place(row, column, lanes)]
        integers = ins.load_i32(T.address_of(result.out[result.out_at + (row * PANEL + column)]), lanes)
        flush = Flush(result, codes, result.panel_at, 0, lanes, unsigned=True)
        return flush.value(row, column, ins.from_i32(integers, lanes))

    def _by_rows(self, step: Step, few: int, many: Any) -> None:
        """So many rows in vector registers, more by `many`, and what is left of more than fit in one step."""
        switch(
            T.Select(step.count == 1, T.min(step.rows, few + 1), T.int32(few + 1)),
            [*range(1, few + 1), few + 1],
            lambda rows: step.each_panel(lambda one: self._few.rows(one, rows)) if rows <= few else many(),
        )

    def _pipe(self, codes: Codes, products: Any) -> GroupTiles:
        planes = 1 if codes.int8 else 2
        return GroupTiles(self._decoders[codes], planes, self._config, Ring(self._ring), products)

    def _many(self, step: Step) -> None:
        codes = step.side.coded
        if self._int8:

            def general() -> None:
                self._config.rows(step.rows)
                _by_blocks(step, lambda part, blocks: self._shares(part, codes, blocks))

            if codes.bits == 8:
                general()
            else:
                few = (step.rows <= TILE_ROWS) & (step.count == 1)
                when(few, lambda: self._pipe(codes, self._c).step(step), general)
            return

        def numbers(one: Step) -> None:
            """The first step of a panel makes its numbers; each multiplies them."""
            self._config.rows(one.rows)
            when(one.index == 0, lambda: self._make_numbers(one, codes))
            _by_blocks(one, self._multiply_numbers)

        by_groups = codes.is_short or not codes.split
        by_groups = by_groups and not (codes.has_zeros or 0 < codes.group < BF16_STEP)
        if codes.scales_exponents or by_groups:
            few = (step.rows <= TILE_ROWS) & (step.count == 1)
            when(
                few,
                lambda: step.each_panel(lambda one: self._one_block(one, codes)),
                lambda: step.each_panel(numbers),
            )
        else:
            step.each_panel(numbers)

    def _one_block(self, step: Step, codes: Codes) -> None:
        """Up to 16 rows of bf16, the only ones of their expert."""
        if codes.scales_exponents:
            ExponentTiles(self._decoders[codes], self._config, Ring(self._ring), self._c).step(step)
        else:
            self._config.rows(step.rows)
            self._shares(step, codes, 1)

    # -- group by group --

    def _shares(self, step: Step, codes: Codes, blocks: int) -> None:
        """One step prefetches further on in its panel; of several over 8-bit codes, two each half of the next panel."""
        if not self._int8:
            self._groups(step, codes, blocks, 1)
            return
        if codes.bits < 8:
            share = ins.let(T.Select(step.index == 0, T.int32(1), T.int32(0)))
            switch(share, [1, 0], lambda s: self._groups(step, codes, blocks, s))
            return
        share = ins.let(T.Select(step.count == 1, T.int32(1), T.Select(step.index < 2, T.int32(2), T.int32(0))))
        switch(share, [2, 1, 0] if blocks > 1 else [1, 2, 0], lambda s: self._groups(step, codes, blocks, s))

    def _groups(self, step: Step, codes: Codes, blocks: int, share: int) -> None:
        """Codes to tiles, products of a group, then its scale; C is exact for int8."""
        groups = max(1, codes.groups_per_block)
        steps = codes.block // codes.tile_depth // groups
        num_blocks = ins.let(T.floordiv(step.k_blocks, codes.block // PANEL))
        fetch = _Fetch(step, codes, num_blocks, share)
        rows = RowBlocks(step, codes.tile_depth, blocks)
        if codes.group:
            with T.serial(step.rows * (PANEL // _LANES)) as v:
                place = T.ramp(step.out_at + v * _LANES, 1, _LANES)
                T.buffer_store(step.out, T.broadcast(T.float32(0), _LANES), [place])
        else:
            self._zero(blocks)
        with T.serial(num_blocks) as b:
            at = ins.let(step.w_at + T.Cast("int64", b) * codes.block_bytes)
            fetch.block(b)
            k_block = ins.let(T.Cast("int64", b) * (steps * groups))

            def one(s: Any, slot: Any, at: Any = at, k_block: Any = k_block) -> None:
                code_at = at + (codes.block_head_bytes + s * (codes.tile_depth * PANEL * codes.bits // 8))
                self._multiply(step, codes, rows, _KStep(k_block + s, ins.let(code_at), slot, fetch, s), blocks)

            for g in range(groups):
                if codes.group:
                    self._zero(blocks)
                if steps <= _UNROLLED_STEPS:
                    for s in range(g * steps, (g + 1) * steps):
                        one(s, s % 2 if steps * groups > 1 else T.floormod(T.Cast("int32", b), 2))
                else:
                    with T.serial(steps) as s:
                        one(T.Cast("int64", s), T.floormod(s, 2))
                if codes.group:
                    scales_at = ins.let(at + g * (PANEL * codes.scale_bytes))
                    self._flush(step, codes, scales_at, T.Cast("int64", b) * groups + g, blocks, False)
        if keeps_integers(codes):
            store_tiles(step.out, step.out_at, blocks)
        elif not codes.group:
            self._flush(step, codes, step.panel_at, 0, blocks, True)

    def _zero(self, blocks: int) -> None:
        for tile in range(2 * blocks):
            ins.tile_zero(tile)

    def _multiply(self, step: Step, codes: Codes, rows: RowBlocks, now: _KStep, blocks: int) -> None:
        """C += rows x codes of one k step."""
        as_stored = self._int8 and codes.bits == 8
        if as_stored:
            weights = [T.address_of(step.w[0, 0, now.at + half * UNIT_BYTES]) for half in range(2)]
        else:
            weights = self._decoded(step, codes, now)

        def fetch(part: int, parts: int) -> None:
            if as_stored:
                now.fetch.lines(now.number, part, parts)

        dot = ins.tile_dot_int8 if self._int8 else ins.tile_dot_bf16
        multiply(rows, now.k, lambda half: weights[half], ROW_PAIR, dot, fetch)
        step.waiting.share(codes.tile_depth)

    def _decoded(self, step: Step, codes: Codes, now: _KStep) -> list[Any]:
        """Addresses of a k step's weight tiles; of several steps of a panel the first decodes them all."""
        if not self._int8:
            start = ins.let(T.Cast("int64", now.slot) * STEP_BYTES)
            self._decode(step, codes, now, self._ring, start)
            return [T.address_of(self._ring[start + half * UNIT_BYTES]) for half in range(2)]
        place = T.Select(step.count == 1, T.Cast("int64", now.slot), T.Cast("int64", now.k))
        start = ins.let(place * STEP_BYTES)
        when(step.index == 0, lambda: self._decode(step, codes, now, self._panel, start))
        return [T.address_of(self._panel[start + half * UNIT_BYTES]) for half in range(2)]

    def _decode(self, step: Step, codes: Codes, now: _KStep, target: Any, start: Any) -> None:
        """One k step's codes -> numbers."""
        decoder = self._decoders[codes]
        groups = list(unit_groups(codes, codes.tile_depth))
        for number, group in enumerate(groups):
            now.fetch.lines(now.number, number, len(groups))
            for half in range(2):
                words = load_units(step.w, now.at, group, half, 0, _LANES)

                def put(place: int, j: int, words: list[Any], half: int = half) -> None:
                    values = [decoder.quad(j, words)] if codes.int8 else decoder.pairs(j, words)
                    for n, value in enumerate(values):
                        byte = start + (2 * (len(values) * place + n) + half) * UNIT_BYTES
                        ins.store_i32(T.address_of(target[byte]), value, _LANES)

                decode_each(group, words, put)

    def _flush(self, step: Step, codes: Codes, at: Any, group: Any, blocks: int, first: bool) -> None:
        store_tiles(self._c, 0, blocks)
        flush = Flush(step, codes, at, group, _LANES, unsigned=codes.int8)
        with T.serial(step.rows) as r:
            products = [self._c[T.ramp(r * PANEL + c, 1, _LANES)] for c in range(0, PANEL, _LANES)]
            if self._int8:
                products = [ins.from_i32(p, _LANES) for p in products]
            flush.row(r, products, first)

    # -- a panel of numbers --

    def _make_numbers(self, step: Step, codes: Codes) -> None:
        num_blocks = ins.let(T.floordiv(step.k_blocks, codes.block // PANEL))
        ahead = block_ahead(step, codes, num_blocks)
        decoder = self._decoders[codes]
        channel = None if codes.group else Affine(step, codes, step.panel_at, 0)
        with T.serial(num_blocks) as b:
            at = ins.let(step.w_at + T.Cast("int64", b) * codes.block_bytes)
            prefetch(step, ahead.at(b), codes.block_bytes)
            grouped = self._scaling(step, codes, at)
            steps = codes.block // codes.step
            num_places = codes.step // (4 if codes.in_bytes else 2)  # pairs or fours of k in a step

            def one(s: Any, at: Any = at, b: Any = b, grouped: Any = grouped) -> None:
                code_at = ins.let(at + (codes.block_head_bytes + s * (codes.step * PANEL * codes.bits // 8)))
                target = ins.let((T.Cast("int64", b) * steps + s) * (codes.step // BF16_STEP * STEP_BYTES))
                for group in unit_groups(codes):
                    for half in range(2):
                        words = load_units(step.w, code_at, group, half, 0, _LANES)

                        def put(place: int, j: int, words: list[Any], half: int = half) -> None:
                            affine = channel or grouped[place * len(grouped) // num_places]
                            pairs = decoder.pairs(j, words, codes.scales_exponents)
                            for n, pair in enumerate(pairs):
                                byte = target + (2 * (len(pairs) * place + n) + half) * UNIT_BYTES
                                ins.store_i32(T.address_of(self._panel[byte]), affine.apply(pair, half), _LANES)

                        decode_each(group, words, put)

            if steps == 1:
                one(0)
            else:
                with T.serial(steps) as s:
                    one(T.Cast("int64", s))

    def _scaling(self, step: Step, codes: Codes, at: Any) -> list[Affine | Exponents]:
        """What scales the words of each group of a block."""
        places = [ins.let(at + g * PANEL * codes.scale_bytes) for g in range(codes.groups_per_block)]
        if codes.scales_exponents:
            return [Exponents(step, codes, place) for place in places]
        return [Affine(step, codes, place, g, at) for g, place in enumerate(places)]

    def _multiply_numbers(self, step: Step, blocks: int) -> None:
        rows = RowBlocks(step, BF16_STEP, blocks)
        self._zero(blocks)
        with T.serial(step.k_blocks) as kt:
            k = ins.let(T.Cast("int64", kt))

            def weights(half: int, k: Any = k) -> Any:
                return T.address_of(self._panel[k * STEP_BYTES + half * UNIT_BYTES])

            multiply(rows, k, weights, ROW_PAIR, ins.tile_dot_bf16, lambda part, parts: None)
            step.waiting.share(BF16_STEP)
        store_tiles(step.out, step.out_at, blocks)


def _by_blocks(step: Step, emit: Callable[[Step, int], None]) -> None:
    """emit(step, blocks of 16 rows) for the number of them that the step has, one panel at a time."""

    def up_to_two() -> None:
        when(step.rows > TILE_ROWS, lambda: emit(step, 2), lambda: step.each_panel(lambda one: emit(one, 1)))

    when(step.rows > 2 * TILE_ROWS, lambda: emit(step, 3), up_to_two)


class _Fetch:
    """What a step prefetches: a whole block per block further on, or a share of the next panel."""

    def __init__(self, step: Step, codes: Codes, num_blocks: Any, share: int) -> None:
        self._step, self._codes, self._share = step, codes, share
        if share > 1:
            size = codes.block_bytes // share
            start = ins.let(step.next_at + T.Cast("int64", step.index * num_blocks) * size)
            self._ahead = lambda b: ins.let(start + T.Cast("int64", b) * size)
        elif share:
            self._ahead = block_ahead(step, codes, num_blocks).at

    def block(self, b: Any) -> None:
        """At the start of block b: the scales."""
        if self._share:
            self._at = self._ahead(b)
            prefetch(self._step, self._at, self._codes.block_head_bytes // self._share)

    def lines(self, number: Any, part: int, parts: int) -> None:
        """Part of the codes of the block's k step `number`."""
        if not self._share:
            return
        size = self._codes.tile_depth * PANEL * self._codes.bits // 8 // self._share
        head = self._codes.block_head_bytes // self._share
        first, last = (n * (size // UNIT_BYTES) // parts * UNIT_BYTES for n in (part, part + 1))
        prefetch(self._step, self._at + (head + number * size + first), last - first)


@dataclasses.dataclass(frozen=True)
class _KStep:
    """One k step: its number in the step, the byte of its codes, its slot in the ring, its number in the block."""

    k: Any
    at: Any
    slot: Any
    fetch: _Fetch
    number: Any
