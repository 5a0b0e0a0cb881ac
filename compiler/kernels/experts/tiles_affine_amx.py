"""Scales and zeros of a group as what turns bf16 pairs of code numbers into bf16 pairs of weights."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.codes import Codes
from moec.compiler.kernels.experts.tiles import Step
from moec.compiler.kernels.experts.tiles_codes import load_scales, load_zeros

_LANES = 16


class Affine:
    """scale * (number - zero) for words of bf16 pairs, rounded to bf16; the scales of 32 columns."""

    def __init__(self, step: Step, codes: Codes, at: Any, group: int, block_at: Any = None) -> None:
        self._scales = load_scales(step, codes, at, _LANES)
        zeros = load_zeros(step, codes, at if block_at is None else block_at, _LANES, group)
        nothing = T.broadcast(T.float32(0), _LANES)
        self._shift = [
            T.Bind(nothing - z * s) if codes.has_zeros else nothing
            for z, s in zip(zeros or self._scales, self._scales, strict=True)
        ]

    def apply(self, words: Any, half: int) -> Any:
        """Words of one half."""
        return T.Bind(T.call_extern("int32x16", "moec_scale_words", words, self._scales[half], self._shift[half]))


AFFINE_TEXT = """
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
define linkonce_odr <16 x i32> @moec_scale_words(<16 x i32> %w, <16 x float> %s, <16 x float> %z) alwaysinline {
  %l = shl <16 x i32> %w, splat (i32 16)
  %h = and <16 x i32> %w, splat (i32 -65536)
  %lf = bitcast <16 x i32> %l to <16 x float>
  %hf = bitcast <16 x i32> %h to <16 x float>
  %lm = call <16 x float> @llvm.fma.v16f32(<16 x float> %lf, <16 x float> %s, <16 x float> %z)
  %hm = call <16 x float> @llvm.fma.v16f32(<16 x float> %hf, <16 x float> %s, <16 x float> %z)
  %li = bitcast <16 x float> %lm to <16 x i32>
  %hi = bitcast <16 x float> %hm to <16 x i32>
  %lr = add <16 x i32> %li, splat (i32 32768)
  %hr = add <16 x i32> %hi, splat (i32 32768)
  %a = lshr <16 x i32> %lr, splat (i32 16)
  %b = and <16 x i32> %hr, splat (i32 -65536)
  %r = or <16 x i32> %a, %b
  ret <16 x i32> %r
}
"""
