"""The LLVM IR of the functions that intrinsics.py calls: what of it a kernel of an instruction-set level needs.

Text with {n} is of vectors of n lanes. `linkonce_odr` and `alwaysinline`: equal definitions in one library are one, and
none is left as a call.
"""

from __future__ import annotations

HAS_DOT_BF16 = ("avx512_bf16", "amx_bf16")

_PER_WIDTH = """
define linkonce_odr <{n} x float> @moec_load_bf16_x{n}(ptr %p) alwaysinline {{
  %h = load <{n} x i16>, ptr %p, align 2
  %w = zext <{n} x i16> %h to <{n} x i32>
  %s = shl <{n} x i32> %w, splat (i32 16)
  %r = bitcast <{n} x i32> %s to <{n} x float>
  ret <{n} x float> %r
}}
define linkonce_odr <{n} x i32> @moec_load_i32_x{n}(ptr %p) alwaysinline {{
  %r = load <{n} x i32>, ptr %p, align 1
  ret <{n} x i32> %r
}}
define linkonce_odr i32 @moec_store_i32_x{n}(ptr %p, <{n} x i32> %v) alwaysinline {{
  store <{n} x i32> %v, ptr %p, align 1
  ret i32 0
}}
define linkonce_odr <{n} x float> @moec_load_f32_x{n}(ptr %p) alwaysinline {{
  %r = load <{n} x float>, ptr %p, align 1
  ret <{n} x float> %r
}}
define linkonce_odr i32 @moec_store_f32_x{n}(ptr %p, <{n} x float> %v) alwaysinline {{
  store <{n} x float> %v, ptr %p, align 1
  ret i32 0
}}
define linkonce_odr <{n} x float> @moec_low_bf16_x{n}(<{n} x i32> %v) alwaysinline {{
  %s = shl <{n} x i32> %v, splat (i32 16)
  %r = bitcast <{n} x i32> %s to <{n} x float>
  ret <{n} x float> %r
}}
define linkonce_odr <{n} x float> @moec_high_bf16_x{n}(<{n} x i32> %v) alwaysinline {{
  %s = and <{n} x i32> %v, splat (i32 -65536)
  %r = bitcast <{n} x i32> %s to <{n} x float>
  ret <{n} x float> %r
}}
"""

_PER_COUNT = """
declare {I} @llvm.smax.{i}({I}, {I})
define linkonce_odr {I} @moec_magnitude{x}({F} %v) alwaysinline {{
  %i = bitcast {F} %v to {I}
  %r = and {I} %i, {positive}
  ret {I} %r
}}
define linkonce_odr {I} @moec_max_i32{x}({I} %a, {I} %b) alwaysinline {{
  %r = call {I} @llvm.smax.{i}({I} %a, {I} %b)
  ret {I} %r
}}
define linkonce_odr i32 @moec_store_i8{x}(ptr %p, {F} %v) alwaysinline {{
  %n = fadd {F} %v, {magic}
  %i = bitcast {F} %n to {I}
  %b = trunc {I} %i to {B}
  store {B} %b, ptr %p, align 1
  ret i32 0
}}
define linkonce_odr {F} @moec_from_i32{x}({I} %v) alwaysinline {{
  %r = sitofp {I} %v to {F}
  ret {F} %r
}}
"""

_REDUCE = """
declare i32 @llvm.vector.reduce.smax.v{n}i32(<{n} x i32>)
declare i32 @llvm.vector.reduce.add.v{n}i32(<{n} x i32>)
declare float @llvm.vector.reduce.fadd.v{n}f32(float, <{n} x float>)
define linkonce_odr i32 @moec_greatest_x{n}(<{n} x i32> %v) alwaysinline {{
  %r = call i32 @llvm.vector.reduce.smax.v{n}i32(<{n} x i32> %v)
  ret i32 %r
}}
define linkonce_odr i32 @moec_total_i32_x{n}(<{n} x i32> %v) alwaysinline {{
  %r = call i32 @llvm.vector.reduce.add.v{n}i32(<{n} x i32> %v)
  ret i32 %r
}}
define linkonce_odr float @moec_total_f32_x{n}(<{n} x float> %v) alwaysinline {{
  %r = call reassoc float @llvm.vector.reduce.fadd.v{n}f32(float 0.0, <{n} x float> %v)
  ret float %r
}}
define linkonce_odr <{n} x i32> @moec_load_i8_x{n}(ptr %p) alwaysinline {{
  %b = load <{n} x i8>, ptr %p, align 1
  %r = sext <{n} x i8> %b to <{n} x i32>
  ret <{n} x i32> %r
}}
define linkonce_odr <{n} x float> @moec_load_u8_x{n}(ptr %p) alwaysinline {{
  %b = load <{n} x i8>, ptr %p, align 1
  %i = zext <{n} x i8> %b to <{n} x i32>
  %r = sitofp <{n} x i32> %i to <{n} x float>
  ret <{n} x float> %r
}}
"""

_SCALAR = """
define linkonce_odr i32 @moec_let_int32(i32 %v) alwaysinline {
  ret i32 %v
}
define linkonce_odr i64 @moec_let_int64(i64 %v) alwaysinline {
  ret i64 %v
}define linkonce_odr ptr @moec_pointer(ptr %p) alwaysinline {
  ret ptr %p
}
define linkonce_odr float @moec_load_bf16(ptr %p) alwaysinline {
  %h = load i16, ptr %p, align 2
  %w = zext i16 %h to i32
  %s = shl i32 %w, 16
  %r = bitcast i32 %s to float
  ret float %r
}
define linkonce_odr i32 @moec_load_i32(ptr %p) alwaysinline {
  %r = load i32, ptr %p, align 2
  ret i32 %r
}
define linkonce_odr i32 @moec_fetch_add(ptr %p, i32 %v) alwaysinline {
  %r = atomicrmw add ptr %p, i32 %v monotonic
  ret i32 %r
}
"""

_ROUND_IN_HARDWARE = """
define linkonce_odr i32 @moec_store_bf16{suffix}(ptr %p, {open}float{close} %v) alwaysinline {{
  %h = fptrunc {open}float{close} %v to {open}bfloat{close}
  store {open}bfloat{close} %h, ptr %p, align 2
  ret i32 0
}}
"""

# To nearest even by integers; a NaN keeps its sign and gets its quiet bit, or rounding could make it infinite.
_ROUND_IN_SOFTWARE = """
define linkonce_odr i32 @moec_store_bf16{suffix}(ptr %p, {open}float{close} %v) alwaysinline {{
  %i = bitcast {open}float{close} %v to {open}i32{close}
  %top = lshr {open}i32{close} %i, {c16}
  %odd = and {open}i32{close} %top, {c1}
  %bias = add {open}i32{close} %odd, {c32767}
  %sum = add {open}i32{close} %i, %bias
  %even = lshr {open}i32{close} %sum, {c16}
  %quiet = or {open}i32{close} %top, {c64}
  %isnan = fcmp uno {open}float{close} %v, %v
  %r = select {open}i1{close} %isnan, {open}i32{close} %quiet, {open}i32{close} %even
  %h = trunc {open}i32{close} %r to {open}i16{close}
  store {open}i16{close} %h, ptr %p, align 2
  ret i32 0
}}
"""


def _round_text(level: str, lanes: int) -> str:
    names = {"suffix": "", "open": "", "close": ""}
    if lanes > 1:
        names = {"suffix": f"_x{lanes}", "open": f"<{lanes} x ", "close": ">"}
    constants = {f"c{n}": f"splat (i32 {n})" if lanes > 1 else str(n) for n in (1, 16, 64, 32767)}
    text = _ROUND_IN_HARDWARE if level in HAS_DOT_BF16 else _ROUND_IN_SOFTWARE
    return text.format(**names, **constants)


DOT_BF16 = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define linkonce_odr <16 x float> @moec_dot_bf16_x16(<16 x float> %c, <16 x i32> %a, <16 x i32> %b) alwaysinline {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %c, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
"""


# the nearest integer v of 16 bits as two bytes with a sign, v = 256 * high + low; in the order of codes.WORD_ORDER
_SPLIT = """
define linkonce_odr i32 @moec_store_split_x16(ptr %high, ptr %low, <16 x float> %v) alwaysinline {
  %n = fadd <16 x float> %v, splat (float 12582912.0)
  %i = bitcast <16 x float> %n to <16 x i32>
  %r = add <16 x i32> %i, splat (i32 128)
  %t = lshr <16 x i32> %r, splat (i32 8)
  %h = trunc <16 x i32> %t to <16 x i8>
  %l = trunc <16 x i32> %i to <16 x i8>
  %ho = shufflevector <16 x i8> %h, <16 x i8> poison, <16 x i32> <ORDER>
  %lo = shufflevector <16 x i8> %l, <16 x i8> poison, <16 x i32> <ORDER>
  store <16 x i8> %ho, ptr %high, align 1
  store <16 x i8> %lo, ptr %low, align 1
  ret i32 0
}
""".replace("ORDER", ", ".join(f"i32 {4 * n + k}" for n in range(4) for k in (0, 2, 1, 3)))


def _count_text(n: int) -> str:
    """_PER_COUNT for n lanes."""

    def vector(kind: str) -> str:
        return kind if n == 1 else f"<{n} x {kind}>"

    names = {"F": vector("float"), "I": vector("i32"), "B": vector("i8"), "x": "" if n == 1 else f"_x{n}"}
    names |= {"f": "f32" if n == 1 else f"v{n}f32", "i": "i32" if n == 1 else f"v{n}i32"}
    # adding 1.5 * 2**23 rounds to an integer in the low bits (llvm.fptosi.sat would be done number by number)
    magic = "12582912.0" if n == 1 else "splat (float 12582912.0)"
    return _PER_COUNT.format(**names, positive="2147483647" if n == 1 else "splat (i32 2147483647)", magic=magic)


def definitions(level: str) -> str:
    """All functions of a level: for one number and for each of its vector widths, 8 and 16 f32 lanes."""
    widths = (8,) if level == "avx2" else (8, 16)
    text = _SCALAR + "".join(_PER_WIDTH.format(n=n) for n in widths)
    text += "".join(_round_text(level, n) for n in (1, *widths))
    text += "".join(_count_text(n) for n in (1, *widths)) + "".join(_REDUCE.format(n=n) for n in widths)
    return text + (DOT_BF16 + _SPLIT if level in HAS_DOT_BF16 else "")
