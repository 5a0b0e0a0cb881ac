"""The LLVM-IR functions behind moec.compiler.kernels.simd, for a number of lanes.

Loads and stores, rounding to bf16 and int8, reductions, orders of keys, exp and what is made of it.

Names in braces are types and constants of the lane count, filled in by `functions`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable


def constant(x: float) -> str:
    """A float32 constant as LLVM writes it: the hex digits of the same value as a double."""
    return "0x" + struct.pack(">d", struct.unpack("f", struct.pack("f", x))[0]).hex().upper()


def _splat(kind: str, value: str, n: int) -> str:
    return value if n == 1 else f"splat ({kind} {value})"


def _indices(places: Iterable[int]) -> str:
    return ", ".join(f"i32 {i}" for i in places)


_PLAIN = """
define linkonce_odr {F} @moec_simd_load_f32_{n}(ptr %p) alwaysinline {{
  %a = load {F}, ptr %p, align 4
  ret {F} %a
}}
define linkonce_odr void @moec_simd_store_f32_{n}(ptr %p, {F} %x) alwaysinline {{
  store {F} %x, ptr %p, align 4
  ret void
}}
define linkonce_odr {I} @moec_simd_load_i32_{n}(ptr %p) alwaysinline {{
  %a = load {I}, ptr %p, align 2
  ret {I} %a
}}
define linkonce_odr {F} @moec_simd_even_{n}({I} %a) alwaysinline {{
  %b = shl {I} %a, {c16}
  %c = bitcast {I} %b to {F}
  ret {F} %c
}}
define linkonce_odr {F} @moec_simd_odd_{n}({I} %a) alwaysinline {{
  %b = and {I} %a, {high}
  %c = bitcast {I} %b to {F}
  ret {F} %c
}}
define linkonce_odr {F} @moec_simd_load_bf16_{n}(ptr %p) alwaysinline {{
  %a = load {H}, ptr %p, align 2
  %b = zext {H} %a to {I}
  %c = shl {I} %b, {c16}
  %d = bitcast {I} %c to {F}
  ret {F} %d
}}
declare {F} @llvm.minnum.{f}({F}, {F})
declare {F} @llvm.maxnum.{f}({F}, {F})
define linkonce_odr {F} @moec_simd_load_i8_{n}(ptr %p) alwaysinline {{
  %a = load {C}, ptr %p, align 1
  %b = sitofp {C} %a to {F}
  ret {F} %b
}}
define linkonce_odr void @moec_simd_store_i8_{n}(ptr %p, {F} %x) alwaysinline {{
  %isnan = fcmp uno {F} %x, %x
  %y = select {B} %isnan, {F} {zero}, {F} %x
  %l = call nnan {F} @llvm.minnum.{f}({F} %y, {F} {most_i8})
  %a = call nnan {F} @llvm.maxnum.{f}({F} %l, {F} {least_i8})
  %m = fadd {F} %a, {magic}
  %i = bitcast {F} %m to {I}
  %b = trunc {I} %i to {C}
  store {C} %b, ptr %p, align 1
  ret void
}}
define linkonce_odr {I} @moec_simd_bits_bf16_{n}{native}({F} %x) alwaysinline {{
{to_bf16}
}}
define linkonce_odr void @moec_simd_store_bf16_{n}{native}(ptr %p, {F} %x) alwaysinline {{
  %b = call {I} @moec_simd_bits_bf16_{n}{native}({F} %x)
  %c = trunc {I} %b to {H}
  store {H} %c, ptr %p, align 2
  ret void
}}
define linkonce_odr {F} @moec_simd_round_bf16_{n}{native}({F} %x) alwaysinline {{
  %b = call {I} @moec_simd_bits_bf16_{n}{native}({F} %x)
  %c = shl {I} %b, {c16}
  %d = bitcast {I} %c to {F}
  ret {F} %d
}}
"""
_NIBBLES = """
define linkonce_odr {F} @moec_simd_load_low_i4_{n}(ptr %p) alwaysinline {{
  %a = load {C}, ptr %p, align 1
  %b = zext {C} %a to {I}
  %c = and {I} %b, {c15}
  %d = sub {I} %c, {c8}
  %e = sitofp {I} %d to {F}
  ret {F} %e
}}
define linkonce_odr {F} @moec_simd_load_high_i4_{n}(ptr %p) alwaysinline {{
  %a = load {C}, ptr %p, align 1
  %b = zext {C} %a to {I}
  %c = lshr {I} %b, {c4}
  %d = sub {I} %c, {c8}
  %e = sitofp {I} %d to {F}
  ret {F} %e
}}
"""
# vpermps looks at the low four bits of an index alone
_NIBBLES_16 = """
declare <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float>, <16 x i32>)
define linkonce_odr {F} @moec_simd_load_low_i4_{n}(ptr %p) alwaysinline {{
  %a = load {C}, ptr %p, align 1
  %b = zext {C} %a to {I}
  %c = call {F} @llvm.x86.avx512.permvar.sf.512({F} <{codes}>, {I} %b)
  ret {F} %c
}}
define linkonce_odr {F} @moec_simd_load_high_i4_{n}(ptr %p) alwaysinline {{
  %a = load {C}, ptr %p, align 1
  %b = zext {C} %a to {I}
  %c = lshr {I} %b, {c4}
  %d = call {F} @llvm.x86.avx512.permvar.sf.512({F} <{codes}>, {I} %c)
  ret {F} %d
}}
"""


SCALARS = """
define linkonce_odr i64 @moec_simd_opaque(i64 %x) alwaysinline {
  ret i64 %x
}
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define linkonce_odr void @moec_simd_prefetch(ptr %p) alwaysinline {
  call void @llvm.prefetch.p0(ptr %p, i32 0, i32 2, i32 1)
  ret void
}
"""

# two registers of values in turn <-> one of those at even and one of those at odd places
_PAIRS = """
define linkonce_odr {F} @moec_simd_load_f32_even_{n}(ptr %p) alwaysinline {{
  %a = load <{n2} x float>, ptr %p, align 4
  %b = shufflevector <{n2} x float> %a, <{n2} x float> poison, <{n} x i32> <{even}>
  ret {F} %b
}}
define linkonce_odr {F} @moec_simd_load_f32_odd_{n}(ptr %p) alwaysinline {{
  %a = load <{n2} x float>, ptr %p, align 4
  %b = shufflevector <{n2} x float> %a, <{n2} x float> poison, <{n} x i32> <{odd}>
  ret {F} %b
}}
define linkonce_odr void @moec_simd_store_f32_pairs_{n}(ptr %p, {F} %x, {F} %y) alwaysinline {{
  %a = shufflevector {F} %x, {F} %y, <{n2} x i32> <{zip}>
  store <{n2} x float> %a, ptr %p, align 4
  ret void
}}
define linkonce_odr void @moec_simd_store_bf16_pairs_{n}{native}(ptr %p, {F} %x, {F} %y) alwaysinline {{
  %a = call {I} @moec_simd_bits_bf16_{n}{native}({F} %x)
  %b = call {I} @moec_simd_bits_bf16_{n}{native}({F} %y)
  %c = shl {I} %b, {c16}
  %d = or {I} %a, %c
  store {I} %d, ptr %p, align 2
  ret void
}}
"""

# round to nearest even; every NaN becomes 0x7fc0, as in torch
_TO_BF16 = """  %b = bitcast {F} %x to {I}
  %s = lshr {I} %b, {c16}
  %l = and {I} %s, {one}
  %h = add {I} %l, {half}
  %r = add {I} %b, %h
  %t = lshr {I} %r, {c16}
  %nan = fcmp uno {F} %x, %x
  %z = select {B} %nan, {I} {quiet}, {I} %t
  ret {I} %z"""

_TO_BF16_NATIVE = """  %t = fptrunc {F} %x to {BF}
  %h = bitcast {BF} %t to {H}
  %z = zext {H} %h to {I}
  ret {I} %z"""

_REDUCE = """
declare float @llvm.vector.reduce.fadd.v{n}f32(float, {F})
declare i32 @llvm.vector.reduce.smax.v{n}i32({I})
declare i32 @llvm.vector.reduce.umin.v{n}i32({I})
define linkonce_odr float @moec_simd_sum_{n}({F} %x) alwaysinline {{
  %a = call reassoc float @llvm.vector.reduce.fadd.v{n}f32(float {minus0}, {F} %x)
  ret float %a
}}
define linkonce_odr float @moec_simd_max_{n}({F} %x) alwaysinline {{
  %k = call {I} @moec_simd_key_{n}({F} %x)
  %m = call i32 @llvm.vector.reduce.smax.v{n}i32({I} %k)
  %a = call float @moec_simd_unkey_1(i32 %m)
  ret float %a
}}
define linkonce_odr i32 @moec_simd_max_key_{n}({I} %k) alwaysinline {{
  %m = call i32 @llvm.vector.reduce.smax.v{n}i32({I} %k)
  ret i32 %m
}}
define linkonce_odr i32 @moec_simd_first_{n}({I} %k, {I} %idx, i32 %m) alwaysinline {{
  %i = insertelement {I} poison, i32 %m, i32 0
  %s = shufflevector {I} %i, {I} poison, {I} zeroinitializer
  %e = icmp eq {I} %k, %s
  %c = select {B} %e, {I} %idx, {I} {all}
  %a = call i32 @llvm.vector.reduce.umin.v{n}i32({I} %c)
  ret i32 %a
}}
"""

# key: an int that orders as top_k_stable does: -0 = +0, NaN above +inf, and i32 minimum below everything
_KEYS = """
define linkonce_odr {I} @moec_simd_key_{n}({F} %x) alwaysinline {{
  %p = fadd {F} %x, {zero}
  %b = bitcast {F} %p to {I}
  %s = ashr {I} %b, {c31}
  %m = and {I} %s, {positive}
  %k = xor {I} %b, %m
  %nan = fcmp uno {F} %x, %x
  %z = select {B} %nan, {I} {positive}, {I} %k
  ret {I} %z
}}
define linkonce_odr {F} @moec_simd_unkey_{n}({I} %k) alwaysinline {{
  %s = ashr {I} %k, {c31}
  %m = and {I} %s, {positive}
  %b = xor {I} %k, %m
  %x = bitcast {I} %b to {F}
  ret {F} %x
}}
"""

# exp: n = rint(x log2 e), r = x - n ln2, a polynomial of degree 7 (Cephes' expf), and 2^n in two steps for the ends.
# Error at most 2 ulp (test_simd.py); NaN stays NaN, +inf gives inf, below -104 gives 0.
_EXP = """
declare {F} @llvm.fma.{f}({F}, {F}, {F})
define linkonce_odr {F} @moec_simd_exp_{n}({F} %x0) alwaysinline {{
  %lo = fcmp olt {F} %x0, {low}
  %x1 = select {B} %lo, {F} {low}, {F} %x0
  %hi = fcmp ogt {F} %x1, {top}
  %x = select {B} %hi, {F} {top}, {F} %x1
  %big = call {F} @llvm.fma.{f}({F} %x, {F} {log2e}, {F} {magic})
  %n = fsub {F} %big, {magic}
  %r0 = call {F} @llvm.fma.{f}({F} %n, {F} {ln2_hi}, {F} %x)
  %r = call {F} @llvm.fma.{f}({F} %n, {F} {ln2_lo}, {F} %r0)
  %p6 = call {F} @llvm.fma.{f}({F} %r, {F} {e7}, {F} {e6})
  %p5 = call {F} @llvm.fma.{f}({F} %r, {F} %p6, {F} {e5})
  %p4 = call {F} @llvm.fma.{f}({F} %r, {F} %p5, {F} {e4})
  %p3 = call {F} @llvm.fma.{f}({F} %r, {F} %p4, {F} {e3})
  %p2 = call {F} @llvm.fma.{f}({F} %r, {F} %p3, {F} {e2})
  %p1 = call {F} @llvm.fma.{f}({F} %r, {F} %p2, {F} {e1})
  %p0 = call {F} @llvm.fma.{f}({F} %r, {F} %p1, {F} {e1})
  %bi = bitcast {F} %big to {I}
  %i = sub {I} %bi, {magic_bits}
  %i1 = ashr {I} %i, {one}
  %i2 = sub {I} %i, %i1
  %j1 = add {I} %i1, {bias}
  %j2 = add {I} %i2, {bias}
  %k1 = shl {I} %j1, {c23}
  %k2 = shl {I} %j2, {c23}
  %s1 = bitcast {I} %k1 to {F}
  %s2 = bitcast {I} %k2 to {F}
  %y1 = fmul {F} %p0, %s1
  %y2 = fmul {F} %y1, %s2
  ret {F} %y2
}}
define linkonce_odr {F} @moec_simd_sigmoid_{n}({F} %x) alwaysinline {{
  %m = fneg {F} %x
  %e = call {F} @moec_simd_exp_{n}({F} %m)
  %d = fadd {F} %e, {e1}
  %y = fdiv {F} {e1}, %d
  ret {F} %y
}}
define linkonce_odr {F} @moec_simd_tanh_{n}({F} %x) alwaysinline {{
  %x2 = fadd {F} %x, %x
  %e = call {F} @moec_simd_exp_{n}({F} %x2)
  %d = fadd {F} %e, {e1}
  %q = fdiv {F} {two}, %d
  %far = fsub {F} {e1}, %q
  %s = fmul {F} %x, %x
  %t4 = call {F} @llvm.fma.{f}({F} %s, {F} {t9}, {F} {t7})
  %t3 = call {F} @llvm.fma.{f}({F} %s, {F} %t4, {F} {t5})
  %t2 = call {F} @llvm.fma.{f}({F} %s, {F} %t3, {F} {t3})
  %t1 = call {F} @llvm.fma.{f}({F} %s, {F} %t2, {F} {e1})
  %near = fmul {F} %x, %t1
  %small = fcmp olt {F} %s, {sixteenth}
  %y = select {B} %small, {F} %near, {F} %far
  ret {F} %y
}}
"""


def _transpose_sum(n: int) -> str:
    """n vectors of n lanes -> one vector, lane i the sum of vector i: log2(n) rounds of pairwise shuffles and adds."""
    kind = f"<{n} x float>"
    arguments = ", ".join(f"{kind} %r0_{i}" for i in range(n))
    lines = [f"define linkonce_odr {kind} @moec_simd_transpose_sum_{n}({arguments}) alwaysinline {{"]
    width, count, level = 1, n, 0
    while count > 1:
        low = [k // (2 * width) * 2 * width + k % width + (n if k // width % 2 else 0) for k in range(n)]
        for i in range(count // 2):
            pair = f"{kind} %r{level}_{2 * i}, {kind} %r{level}_{2 * i + 1}"
            for side, shift in (("a", 0), ("b", width)):
                mask = _indices(k + shift for k in low)
                lines.append(f"  %{side}{level}_{i} = shufflevector {pair}, <{n} x i32> <{mask}>")
            lines.append(f"  %r{level + 1}_{i} = fadd {kind} %a{level}_{i}, %b{level}_{i}")
        width, count, level = width * 2, count // 2, level + 1
    return "\n".join([*lines, f"  ret {kind} %r{level}_0", "}", ""])


_INTS = {
    "c4": 4,
    "c8": 8,
    "c15": 15,
    "c16": 16,
    "c31": 31,
    "c23": 23,
    "one": 1,
    "half": 0x7FFF,
    "quiet": 0x7FC0,
    "positive": 0x7FFFFFFF,
    "all": -1,
}
_INTS |= {"high": -65536, "bias": 127, "magic_bits": 0x4B400000}
_FLOATS = {
    "zero": 0.0, "minus0": -0.0, "two": 2.0, "sixteenth": 1 / 16, "low": -104.0, "top": 89.0, "magic": 12582912.0,
    "least_i8": -128.0, "most_i8": 127.0, "log2e": 1.4426950408889634, "ln2_hi": -0.693359375, "ln2_lo": 2.12194440e-4,
    "e1": 1.0, "e2": 5.0000001201e-1, "e3": 1.6666665459e-1, "e4": 4.1665795894e-2, "e5": 8.3334519073e-3,
    "e6": 1.3981999507e-3, "e7": 1.98756915e-4,
    "t3": -1 / 3, "t5": 2 / 15, "t7": -17 / 315, "t9": 62 / 2835,
}  # fmt: skip


def functions(n: int, native: bool) -> str:
    """The functions for n lanes. native: the processor rounds to bf16 by itself (needs avx512_bf16 and n >= 8)."""

    def vector(kind: str) -> str:
        return kind if n == 1 else f"<{n} x {kind}>"

    names = {"n": n, "F": vector("float"), "I": vector("i32"), "H": vector("i16"), "C": vector("i8")}
    names |= {"B": vector("i1"), "c": "i8" if n == 1 else f"v{n}i8"}
    names |= {"BF": vector("bfloat"), "f": "f32" if n == 1 else f"v{n}f32", "native": "_native" if native else ""}
    names |= {k: _splat("i32", str(x), n) for k, x in _INTS.items()}
    names |= {k: _splat("float", constant(x), n) for k, x in _FLOATS.items() if k != "minus0"}
    names["minus0"] = constant(-0.0)
    names["to_bf16"] = (_TO_BF16_NATIVE if native else _TO_BF16).format(**names)
    names |= {"n2": 2 * n, "even": _indices(range(0, 2 * n, 2)), "odd": _indices(range(1, 2 * n, 2))}
    names["zip"] = _indices(i // 2 + i % 2 * n for i in range(2 * n))
    names["codes"] = ", ".join(f"float {constant(code - 8)}" for code in range(16))
    parts = [_PLAIN, _NIBBLES_16 if n == 16 else _NIBBLES, _KEYS, _EXP] + ([_PAIRS, _REDUCE] if n > 1 else [])
    return "".join(part.format(**names) for part in parts) + (_transpose_sum(n) if n >= 8 else "")
