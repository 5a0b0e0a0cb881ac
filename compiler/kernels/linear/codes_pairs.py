"""Codes as registers of 32 bf16 numbers, 16 pairs: from bytes and from halves of bytes.

For processors with AVX-512 and its bf16 instructions. Numbers are in the order of memory. A pair is one int32 here.
"""

from __future__ import annotations

import struct

from tvm.tirx.script import builder as T

from moec.compiler.kernels.simd import Expr

PAIRS = 32  # numbers in a register


def _bf16(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0] >> 16


# vpermw looks at five bits of an index, a code's four and one of what is beside it: every code is there twice
_CODES = ", ".join(f"i16 {_bf16(i % 16 - 8)}" for i in range(32))

TEXT = f"""
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
declare <32 x i16> @llvm.x86.avx512.permvar.hi.512(<32 x i16>, <32 x i16>)
define linkonce_odr <16 x i32> @moec_pairs_of_nibbles(ptr %p) alwaysinline {{
  %a = load <16 x i8>, ptr %p, align 1
  %low = zext <16 x i8> %a to <16 x i32>
  %high = shl <16 x i32> %low, splat (i32 12)
  %both = or <16 x i32> %low, %high
  %i = bitcast <16 x i32> %both to <32 x i16>
  %c = call <32 x i16> @llvm.x86.avx512.permvar.hi.512(<32 x i16> <{_CODES}>, <32 x i16> %i)
  %r = bitcast <32 x i16> %c to <16 x i32>
  ret <16 x i32> %r
}}
define linkonce_odr <16 x i32> @moec_pairs_of_bytes(ptr %p) alwaysinline {{
  %q = getelementptr i8, ptr %p, i64 16
  %a = load <16 x i8>, ptr %p, align 1
  %b = load <16 x i8>, ptr %q, align 1
  %x = sitofp <16 x i8> %a to <16 x float>
  %y = sitofp <16 x i8> %b to <16 x float>
  %c = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %y, <16 x float> %x)
  %r = bitcast <32 x bfloat> %c to <16 x i32>
  ret <16 x i32> %r
}}
"""


def of_bytes(at: Expr) -> Expr:
    """32 signed bytes from an element, as bf16."""
    return T.Bind(T.call_extern("int32x16", "moec_pairs_of_bytes", T.address_of(at)))


def of_nibbles(at: Expr) -> Expr:
    """16 bytes from an element -> their low and high four bits in turn, each less 8, as bf16."""
    return T.Bind(T.call_extern("int32x16", "moec_pairs_of_nibbles", T.address_of(at)))
