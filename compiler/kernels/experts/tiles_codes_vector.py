"""AVX-512 and AVX2 tiles over quantised weights: codes become numbers in registers and are multiplied at once.

Sums of a group are kept in registers and go to `out` with the group's scale. Row counts and registers are those of
moec.compiler.kernels.experts.tiles_vector.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts import packed_bf16
from moec.compiler.kernels.experts.ahead import (
    HALF_PANEL,
    NEXT_PANEL,
    Ahead,
    by_steps,
    half_panel,
    has_rows_near,
    next_panel,
    rows_near,
)
from moec.compiler.kernels.experts.codes import INT8_STEP, UNIT_BYTES, WORD_ORDER, Codes
from moec.compiler.kernels.experts.layout import HALF, PANEL
from moec.compiler.kernels.experts.plan import Plan
from moec.compiler.kernels.experts.tiles import Result, Step
from moec.compiler.kernels.experts.tiles_codes import (
    ADD_SCALED_TEXT,
    AHEAD_BYTES,
    PLANES_AHEAD_BYTES,
    Flush,
    UnitGroup,
    block_ahead,
    decode_each,
    decoder_text,
    decoders,
    from_planes,
    keeps_integers,
    load_units,
    prefetch,
    prefetch_part,
    unit_groups,
)
from moec.compiler.kernels.experts.tiles_vector import AVX2_ROWS, AVX2_WIDE_ROWS, AVX512_ROWS, DOT_BF16, WIDEN_BF16
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.flow import Vector, switch, when
from moec.passes.ir.packed import EXCEPTION_BYTES, SMALLEST

DOT_INT8, PAIRS_INT8 = "dot_int8", "pairs_int8"


def vector_code_tiles(plan: Plan, method: str, integers: bool = False) -> VectorCodeTiles:
    """The tiles of the plan's level. method: DOT_BF16, WIDEN_BF16, DOT_INT8 (VNNI) or PAIRS_INT8 (AVX2).

    integers: C stays as integers where it can.
    """
    if plan.lanes == 8:
        return VectorCodeTiles(plan, 8, AVX2_ROWS, AVX2_WIDE_ROWS, method, integers)
    return VectorCodeTiles(plan, 16, AVX512_ROWS, AVX512_ROWS, method, integers)


@dataclasses.dataclass(frozen=True)
class _Place:
    """A block of a step: its first byte, its number; those of the step's rows and columns (one entry per vector) that
    are computed, and how many rows lie together.

    fetch: byte to prefetch from meanwhile, None: nothing; ahead: how.
    """

    at: Any
    number: Any
    rows: range
    columns: range
    together: int
    fetch: Any = None
    ahead: Ahead | None = None


@dataclasses.dataclass(frozen=True)
class VectorCodeTiles:
    """Tiles on vector registers; see moec.compiler.kernels.experts.tiles."""

    between: ClassVar[bool] = False

    plan: Plan
    lanes: int
    max_rows: int
    wide_rows: int
    method: str
    integers: bool

    def _decoder(self, codes: Codes) -> Any:
        return decoders(self.plan, self.lanes, self.method == DOT_BF16)[codes]

    def _planes(self, codes: Codes) -> int:
        """Planes of bytes that the rows are multiplied in; 0: rows of numbers."""
        return 1 if codes.int8 else 2 if codes.split and self.method == DOT_BF16 else 0

    def text(self, plan: Plan) -> str:
        """LLVM IR of the decoders and of the byte products."""
        all_of = decoders(plan, self.lanes, self.method == DOT_BF16)
        dot = self.method == DOT_INT8 or plan.splits
        more = _DOT_INT8 if dot else _PAIRS_INT8 if self.method == PAIRS_INT8 else ""
        if self._in_memory:
            more += ADD_SCALED_TEXT.format(n=self.lanes)
        return decoder_text(all_of) + more

    @property
    def _in_memory(self) -> bool:
        """Sums over groups stay in memory. The few rows that vectors do beside AMX leave registers for them."""
        return self.plan.level != "amx_bf16"

    @property
    def _asks_near(self) -> bool:
        """Rows and panels are asked for from the second-level cache too; on AVX2 that made it 1 to 4 % slower."""
        return self.lanes == 16

    def begin(self) -> None:
        """Nothing to set up."""

    def end(self) -> None:
        """Nothing to give back."""

    def value(self, result: Result, row: Any, column: int, lanes: int) -> Any:
        """As it lies."""
        return result.out[result.place(row, column, lanes)]

    def step(self, step: Step) -> None:
        """One step of 1 to max_rows rows."""
        counts = [1, self.max_rows, *range(2, self.max_rows)]
        switch(step.rows, list(dict.fromkeys(counts)), lambda rows: self.rows(step, rows))

    def rows(self, step: Step, rows: int) -> None:
        """A step of a known number of rows."""
        by_steps(step, rows, self.plan.share_rows, lambda asks: self._parts(step, rows, asks))
        if step.side.coded.is_packed:
            self._exceptions(step, rows)

    def _exceptions(self, step: Step, count: int) -> None:
        """Products with what exceptions are more than the code that stands for them (packed_bf16.py)."""

        def word(at: Any) -> Any:
            return ins.load_i32(T.address_of(step.w[0, 0, at]))

        def number(at: Any) -> Any:
            return T.reinterpret("float32", word(at))

        head = ins.let(step.panel_at + packed_bf16.EXCEPTIONS_AT)
        rows = ins.let(T.Cast("int64", step.a_row) * step.a_depth + step.k_start * count)
        with T.serial(word(head)) as n:
            at = ins.let(head + (T.Cast("int64", n) + 1) * EXCEPTION_BYTES)
            place = ins.let(word(at))
            k = ins.let(T.Cast("int64", T.floordiv(place, PANEL)) - step.k_start)
            column = ins.let(T.floormod(place, PANEL))
            scale = number(step.panel_at + 4 * T.Cast("int64", column))
            more = T.Bind(number(at + 4) - scale * T.float32(SMALLEST))

            def add() -> None:
                a_at = ins.let(rows + (k - T.floormod(k, PANEL)) * count + T.floormod(k, PANEL))
                for r in range(count):
                    element = step.a[a_at + r * PANEL]
                    left = ins.load_bf16(T.address_of(element)) if self.method == DOT_BF16 else element
                    total = ins.let(step.out_at + (r * PANEL + column))
                    T.buffer_store(step.out, T.fma(left, more, step.out[total]), [total])

            when((k >= 0) & (k < T.Cast("int64", step.k_blocks) * PANEL), add)

    def _parts(self, step: Step, count: int, asks: str) -> None:
        """The step a part at a time, whose sums registers hold. asks: for what, see by_steps().

        Where rows have two planes they are cut: each of their words is loaded for both halves of the panel, while with
        a half at a time a product would take a load of its own, which is as much as the processor does.
        """
        codes, columns = step.side.coded, range(0, PANEL, self.lanes)
        planes = max(1, self._planes(codes))
        near = self._asks_near and has_rows_near(count, self.max_rows, asks)

        def ahead(num_blocks: Any, part: int = 0, parts: int = 1) -> Ahead:
            if asks == HALF_PANEL:  # each part for the same half: the second one's prefetches find it in the cache
                return half_panel(step, num_blocks, codes.block_bytes)
            if asks == NEXT_PANEL or parts > 1:
                return next_panel(step, num_blocks, codes.block_bytes, self._asks_near, part, parts)
            far = planes == 2 and self.plan.level != "amx_bf16"
            distance = PLANES_AHEAD_BYTES if far else AHEAD_BYTES
            return block_ahead(step, codes, num_blocks, distance, self.plan.blocking.locality(count))

        if count * planes <= self.wide_rows:
            self._part(step, count, range(count), columns, near, ahead)
            return
        if planes == 2:
            size = -(-count // -(-count * planes // self.wide_rows))
            starts = range(0, count, size)
            for n, first in enumerate(starts):
                share = functools.partial(ahead, part=n, parts=len(starts))
                self._part(step, count, range(first, min(first + size, count)), columns, near, share)
            return
        for half in range(0, PANEL, HALF):
            self._part(step, count, range(count), range(half, half + HALF, self.lanes), near, ahead)

    def _part(
        self, step: Step, count: int, rows: range, columns: range, near: bool, make_ahead: Callable[[Any], Ahead]
    ) -> None:
        """Some of the step's `count` rows times some of the panel's columns (one entry per vector).

        near: its rows are asked for before they are read.
        """
        codes = step.side.coded
        planes = self._planes(codes)
        dtype = "int32" if planes else "float32"
        totals = [Vector(self.lanes, dtype) for _ in range(len(rows) * len(columns) * max(1, planes))]
        num_blocks = ins.let(T.floordiv(step.k_blocks, codes.block // PANEL))
        ahead = make_ahead(num_blocks)
        if codes.group:
            for r in rows:
                for c in columns:
                    nothing = T.broadcast(T.float32(0), self.lanes)
                    T.buffer_store(step.out, nothing, [step.place(r, c, self.lanes)])
        with T.serial(num_blocks) as b:
            at = ins.let(step.w_at + T.Cast("int64", b) * codes.block_bytes)
            fetch = ahead.at(b) if columns.start == 0 else None
            place = _Place(at, b, rows, columns, count, fetch, ahead)
            if near:
                start = ins.let(T.Cast("int64", step.a_row) * step.a_depth + step.k_start * count)
                block = codes.block * count
                rows_near(step, start + T.Cast("int64", b) * block, block, self.plan.row_bytes, count, rows)
            if fetch is not None:
                prefetch(step, fetch, codes.block_head_bytes // ahead.share, ahead.locality)
            for g in range(max(1, codes.groups_per_block)):
                self._group(step, codes, place, totals, g)
                if codes.group:
                    scales_at = ins.let(place.at + g * PANEL * codes.scale_bytes)
                    number = T.Cast("int64", b) * codes.groups_per_block + g
                    self._flush(step, codes, place, totals, scales_at, number, g)
        if not codes.group:
            self._flush(step, codes, _Place(None, 0, rows, columns, count), totals, step.panel_at, 0, 0)

    def _group(self, step: Step, codes: Codes, place: _Place, totals: list[Vector], g: int) -> None:
        """Products of the units of group g of a block."""
        units = list(unit_groups(codes))
        per_step = len(units)
        num_units = per_step * (codes.block // codes.step) // max(1, codes.groups_per_block)
        unit_bytes = 2 * UNIT_BYTES * units[0].loads
        depth = codes.unit_depth
        rows = ins.let(T.Cast("int64", step.a_row) * step.a_depth + step.k_start * place.together)
        with T.serial(num_units) as u:
            unit = ins.let(T.Cast("int64", u) + g * num_units)
            at = ins.let(place.at + (unit * unit_bytes + codes.block_head_bytes))
            k = ins.let(T.Cast("int64", place.number) * codes.block + unit * depth)
            in_step = T.floormod(k, self._row_step(codes))
            inside = T.floordiv(in_step, 2) if self._planes(codes) == 2 else in_step
            a_at = ins.let(rows + (k - in_step) * place.together + inside)
            within = at - place.at if place.ahead is None else T.floordiv(at - place.at, place.ahead.share)
            ahead = None if place.fetch is None else ins.let(place.fetch + within)
            self._unit(step, codes, units[0], (at, ahead), a_at, place, totals)

    def _unit(
        self,
        step: Step,
        codes: Codes,
        unit: UnitGroup,
        at_and_ahead: tuple[Any, Any],
        a_at: Any,
        place: _Place,
        totals: list[Vector],
    ) -> None:
        """The codes of a unit; between them its part of what is ahead (a byte, or None) is asked for."""
        at, ahead = at_and_ahead
        words = {c: load_units(step.w, at, unit, c // HALF, c % HALF, self.lanes) for c in place.columns}
        decoder = self._decoder(codes)
        planes = self._planes(codes)

        def multiply(number: int, j: int, which: list[int]) -> None:
            if ahead is not None and place.ahead is not None:
                size, part, parts = (
                    2 * UNIT_BYTES * unit.loads // place.ahead.share,
                    number - unit.first,
                    len(unit.codes),
                )
                prefetch_part(step, ahead, size, part, parts, place.ahead.locality)
            chosen = [[words[c][u] for u in which] for c in place.columns]
            if planes:
                weights = [decoder.quad(j, w) for w in chosen]
                if self.method == PAIRS_INT8 and codes.bits == 8:
                    weights = [self._call("signed", [w]) for w in weights]
                self._rows_times(step, codes, a_at + number * (4 // planes), weights, place, totals)
            elif codes.split:
                for byte, k in enumerate(WORD_ORDER):
                    weights = [decoder.byte(j, w, byte) for w in chosen]
                    self._rows_times(step, codes, a_at + (number * 4 + k), weights, place, totals)
            elif self.method == WIDEN_BF16:
                pairs = [decoder.pair(j, w) for w in chosen]
                for parity in range(2):
                    weights = [pair[parity] for pair in pairs]
                    self._rows_times(step, codes, a_at + (number * 2 + parity), weights, place, totals)
            else:
                weights = [decoder.word(j, w) for w in chosen]
                self._rows_times(step, codes, a_at + number * 2, weights, place, totals)

        decode_each(unit, list(range(unit.loads)), multiply)

    def _row_step(self, codes: Codes) -> int:
        """k that lie together for a row."""
        return INT8_STEP if self._planes(codes) else PANEL

    def _rows_times(
        self, step: Step, codes: Codes, a_at: Any, weights: list[Any], place: _Place, totals: list[Vector]
    ) -> None:
        """totals += each row's number, pair or four times the weights of each vector of columns."""
        planes = self._planes(codes)
        row_elements = INT8_STEP if planes == 1 else PANEL
        rows = [plane * place.together + r for plane in range(max(1, planes)) for r in place.rows]
        for n_row, r in enumerate(rows):
            element = step.a[a_at + r * row_elements]
            numbers = self.method == WIDEN_BF16
            left = T.Bind(T.broadcast(element if numbers else ins.load_i32(T.address_of(element)), self.lanes))
            for n, weight in enumerate(weights):
                total = totals[n_row * len(weights) + n]
                if numbers:
                    total.set(T.fma(left, weight, total.value))
                elif not planes:
                    total.set(ins.dot_bf16(total.value, left, weight))
                elif self.method == PAIRS_INT8 and codes.bits == 8:
                    total.set(self._call("dot_signed", [total.value, weight, left]))
                else:
                    total.set(self._call("dot_bytes", [total.value, weight, left]))

    def _call(self, name: str, arguments: list[Any]) -> Any:
        return T.Bind(T.call_extern(f"int32x{self.lanes}", f"moec_{name}_x{self.lanes}", *arguments))

    def _flush(
        self, step: Step, codes: Codes, place: _Place, totals: list[Vector], at: Any, number: Any, g: int
    ) -> None:
        count = len(place.columns)
        if self.integers and keeps_integers(codes):
            for i, r in enumerate(place.rows):
                for n, c in enumerate(place.columns):
                    target = T.address_of(step.out[step.out_at + (r * PANEL + c)])
                    ins.store_i32(target, totals[i * count + n].value, self.lanes)
            return
        shift = 128.0 if self.method == PAIRS_INT8 and codes.bits == 8 else 0.0
        unsigned = self._planes(codes) > 0 and not step.side.sum_factor
        flush = Flush(step, codes, at, number, self.lanes, g, unsigned, shift, self._in_memory)
        for i, r in enumerate(place.rows):
            products: list[Any] = [None] * (PANEL // self.lanes)
            added = flush.added(r)
            for n, c in enumerate(place.columns):
                own = [total.value for total in totals[i * count + n :: len(place.rows) * count]]
                products[c // self.lanes] = from_planes(own, self.lanes, added) if self._planes(codes) else own[0]
            flush.row(r, products, first=not codes.group)
        if codes.group:
            for total in totals:
                total.clear()


_DOT_INT8 = """
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <64 x i8>, <64 x i8>)
define linkonce_odr <16 x i32> @moec_dot_bytes_x16(<16 x i32> %c, <16 x i32> %w, <16 x i32> %a) alwaysinline {
  %wb = bitcast <16 x i32> %w to <64 x i8>
  %ab = bitcast <16 x i32> %a to <64 x i8>
  %r = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %c, <64 x i8> %wb, <64 x i8> %ab)
  ret <16 x i32> %r
}
"""

# Products of unsigned and signed bytes are added in pairs of 16 bits, which saturate: codes of 4 bits stay far below,
# those of 8 bits give their sign to the other factor first, and 2 * 128 * 127 fits.
_PAIRS_INT8 = """
declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
declare <32 x i8> @llvm.x86.avx2.psign.b(<32 x i8>, <32 x i8>)
declare <32 x i8> @llvm.abs.v32i8(<32 x i8>, i1)
define linkonce_odr <8 x i32> @moec_dot_bytes_x8(<8 x i32> %c, <8 x i32> %w, <8 x i32> %a) alwaysinline {
  %wb = bitcast <8 x i32> %w to <32 x i8>
  %ab = bitcast <8 x i32> %a to <32 x i8>
  %p = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %wb, <32 x i8> %ab)
  %q = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %p, <16 x i16> splat (i16 1))
  %r = add <8 x i32> %c, %q
  ret <8 x i32> %r
}
define linkonce_odr <8 x i32> @moec_signed_x8(<8 x i32> %w) alwaysinline {
  %r = xor <8 x i32> %w, splat (i32 -2139062144)
  ret <8 x i32> %r
}
define linkonce_odr <8 x i32> @moec_dot_signed_x8(<8 x i32> %c, <8 x i32> %w, <8 x i32> %a) alwaysinline {
  %wb = bitcast <8 x i32> %w to <32 x i8>
  %ab = bitcast <8 x i32> %a to <32 x i8>
  %size = call <32 x i8> @llvm.abs.v32i8(<32 x i8> %wb, i1 false)
  %sign = call <32 x i8> @llvm.x86.avx2.psign.b(<32 x i8> %ab, <32 x i8> %wb)
  %p = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %size, <32 x i8> %sign)
  %q = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %p, <16 x i16> splat (i16 1))
  %r = add <8 x i32> %c, %q
  ret <8 x i32> %r
}
"""
