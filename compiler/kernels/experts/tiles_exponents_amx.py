"""AMX tiles over codes whose scales are powers of two, for up to 16 rows of bf16: a scale is added to exponents.

So a weight tile has its scales before it is multiplied, exactly, and no group has sums of its own. Tiles are decoded
ahead as in tiles_groups_amx.py; even and odd k steps have their own C, because a product waits for the one before it.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.codes import BF16_STEP, UNIT_BYTES, Codes
from moec.compiler.kernels.experts.decode import Decoder
from moec.compiler.kernels.experts.layout import HALF, PANEL
from moec.compiler.kernels.experts.tiles import Step
from moec.compiler.kernels.experts.tiles_amx import TILE_ROWS, RowBlocks, TileConfig
from moec.compiler.kernels.experts.tiles_codes import TILES_AHEAD_BYTES, block_ahead
from moec.compiler.kernels.experts.tiles_ring import AHEAD, Ahead, Ring
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.flow import when

_LANES = 16
_BIAS, _LEAST, _MOST = 127, -80, 120  # of a bf16 exponent; exponents that scales are kept between


class ExponentTiles:
    """products: f32[2 * TILE_ROWS * PANEL], where C is put."""

    def __init__(self, decoder: Decoder, config: TileConfig, ring: Ring, products: Any) -> None:
        self._decoder, self._codes, self._config = decoder, decoder.codes, config
        self._ring, self._products = ring, products

    def step(self, step: Step) -> None:
        """One step of 1 to 16 rows."""
        codes = self._codes
        self._config.all_rows(step.rows)
        steps = codes.block // BF16_STEP
        num_blocks = ins.let(T.floordiv(step.k_blocks, steps))
        last = ins.let(T.Cast("int32", step.k_blocks) - 1)
        rows = RowBlocks(step, BF16_STEP, 1)
        fetch = block_ahead(step, codes, num_blocks, TILES_AHEAD_BYTES)
        size = -(-codes.block_bytes // (steps * UNIT_BYTES)) * UNIT_BYTES
        for tile in range(4):
            ins.tile_zero(tile)
        for number in range(AHEAD):
            self._decode(step, ins.let(T.min(T.int32(number), last)), None)

        def one(number: Any, odd: int) -> None:
            self._multiply(rows, number, odd)
            block, inner = ins.let(T.floordiv(number, steps)), T.floormod(number, steps)
            ahead = (ins.let(fetch.at(block) + T.Cast("int64", inner) * size), size)
            self._decode(step, ins.let(T.min(number + AHEAD, last)), ahead)

        with T.serial(T.floordiv(last, 2) + 1) as pair:
            even = ins.let(T.Cast("int32", pair) * 2)
            one(even, 0)
            when(even < last, lambda: one(ins.let(even + 1), 1))
        self._put_down(step)

    def _multiply(self, rows: RowBlocks, number: Any, odd: int) -> None:
        slot = self._ring.slot(number)
        ins.tile_load(4 + odd, rows.at(0, T.Cast("int64", number)), T.int64(UNIT_BYTES))
        self._ring.load(slot)
        for half in range(2):
            ins.tile_dot_bf16(2 * odd + half, 4 + odd, 6 + half)

    def _decode(self, step: Step, number: Any, ahead: Ahead) -> None:
        """Scaled numbers of a k step -> its slot of the ring."""
        codes = self._codes
        steps = codes.block // BF16_STEP
        block, inner = (T.Cast("int64", f(number, steps)) for f in (T.floordiv, T.floormod))
        block_at = ins.let(step.w_at + block * codes.block_bytes)
        at, slot = (
            ins.let(block_at + inner * (codes.code_bytes // steps) + codes.block_head_bytes),
            self._ring.slot(number),
        )
        group = T.floordiv(inner * BF16_STEP, codes.group)
        exponents = Exponents(step, codes, ins.let(block_at + group * (PANEL * codes.scale_bytes)))

        def rows(j: int, words: list[Any], half: int) -> list[Any]:
            return [exponents.apply(pair, half) for pair in self._decoder.pairs(j, words, True)]

        self._ring.decode(step, codes, at, slot, rows, BF16_STEP, ahead)

    def _put_down(self, step: Step) -> None:
        """C of even and of odd k steps -> out."""
        for odd in range(2):
            for half in range(2):
                place = T.address_of(self._products[odd * (TILE_ROWS * PANEL) + half * _LANES])
                ins.tile_store(2 * odd + half, place, T.int64(PANEL * 4))
        with T.serial(step.rows * (PANEL // _LANES)) as v:
            even, odd = (T.ramp(v * _LANES + n * (TILE_ROWS * PANEL), 1, _LANES) for n in range(2))
            place = T.ramp(step.out_at + v * _LANES, 1, _LANES)
            T.buffer_store(step.out, self._products[even] + self._products[odd], [place])


class Exponents:
    """The scales of a group's 32 columns, which are bf16 powers of two, as what to add to the bits of bf16 pairs.

    at: byte of the scales. Scales are kept between 2**-80 and 2**120, so that no exponent leaves its bits.
    """

    def __init__(self, step: Step, codes: Codes, at: Any) -> None:
        self._of = []
        for half in range(2):
            address = T.address_of(step.w[0, 0, at + half * HALF * codes.scale_bytes])
            self._of.append(T.Bind(T.call_extern("int32x16", "moec_load_exponents", address)))

    def apply(self, words: Any, half: int) -> Any:
        """Words of one half, made for it (Decoder.pairs)."""
        return T.Bind(T.call_extern("int32x16", "moec_add_exponents", words, self._of[half]))


EXPONENTS_TEXT = f"""
declare <16 x i16> @llvm.umax.v16i16(<16 x i16>, <16 x i16>)
declare <16 x i16> @llvm.umin.v16i16(<16 x i16>, <16 x i16>)
define linkonce_odr <16 x i32> @moec_load_exponents(ptr %p) alwaysinline {{
  %s = load <16 x i16>, ptr %p, align 2
  %a = call <16 x i16> @llvm.umax.v16i16(<16 x i16> %s, <16 x i16> splat (i16 {(_BIAS + _LEAST) << 7}))
  %b = call <16 x i16> @llvm.umin.v16i16(<16 x i16> %a, <16 x i16> splat (i16 {(_BIAS + _MOST) << 7}))
  %c = sub <16 x i16> %b, splat (i16 {_BIAS << 7})
  %z = zext <16 x i16> %c to <16 x i32>
  %h = shl <16 x i32> %z, splat (i32 16)
  %r = or <16 x i32> %z, %h
  ret <16 x i32> %r
}}
define linkonce_odr <16 x i32> @moec_add_exponents(<16 x i32> %w, <16 x i32> %s) alwaysinline {{
  %a = bitcast <16 x i32> %w to <32 x i16>
  %b = bitcast <16 x i32> %s to <32 x i16>
  %c = add <32 x i16> %a, %b
  %r = bitcast <32 x i16> %c to <16 x i32>
  ret <16 x i32> %r
}}
"""
