"""Keys and values as int8 codes with a float32 scale for each token and head: reading and writing rows of a cache.

The arithmetic is that of passes/ir/cache_ops.py, step by step in float32, so that the codes are the same.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.simd import Expr, Registers, Simd, constant, for_chunks, lanes_of

_TEXT = """
declare {F} @llvm.rint.{f}({F})
declare {B} @llvm.fptosi.sat.{b}.{f}({F})
define linkonce_odr {F} @moec_codes_load_{n}(ptr %p) alwaysinline {{
  %a = load {B}, ptr %p, align 1
  %b = sitofp {B} %a to {F}
  ret {F} %b
}}
define linkonce_odr void @moec_codes_store_{n}(ptr %p, {F} %x) alwaysinline {{
  %a = call {F} @llvm.rint.{f}({F} %x)
  %b = call {B} @llvm.fptosi.sat.{b}.{f}({F} %a)
  store {B} %b, ptr %p, align 1
  ret void
}}
"""
_INVERSE = """
define linkonce_odr float @moec_codes_inverse(float %x) alwaysinline {{
  %some = fcmp ogt float %x, {zero}
  %a = fdiv float {largest}, %x
  %b = select i1 %some, float %a, float {zero}
  ret float %b
}}
""".format(zero=constant(0.0), largest=constant(127.0))


def text(v: Simd) -> str:
    """The LLVM functions that this file calls, for 1 and for `lanes` lanes."""
    parts = [_INVERSE]
    for n in (1, v.lanes):
        names = {"n": n, "F": "float", "B": "i8", "f": "f32", "b": "i8"}
        if n > 1:
            names |= {"F": f"<{n} x float>", "B": f"<{n} x i8>", "f": f"v{n}f32", "b": f"v{n}i8"}
        parts.append(_TEXT.format(**names))
    return "".join(parts)


def load(at: Expr, n: int) -> Expr:
    """n codes from an element, as float32."""
    return T.Bind(T.call_extern(lanes_of("float32", n), f"moec_codes_load_{n}", T.address_of(at)))


def write_row(
    v: Simd, new: Any, dtype: str, row: tuple[Expr, Expr], cache: Any, scales: Any, at: tuple[Any, ...]
) -> None:
    """new[row, :] as codes into cache[at, :] and their scale into scales[at]."""
    width = new.shape[-1]
    largest, whole = Registers(1, v.lanes, "int32"), Registers(1, 1, "int32")
    largest.fill(0)
    whole.fill(0)

    def widest(place: Expr, n: int, _: int) -> None:
        value = v.load(new[(*row, place)], dtype, n)
        key = T.max(
            v.key(value, n), v.key(T.Bind(T.float32(0) - value if n == 1 else v.splat(T.float32(0), n) - value), n)
        )
        into = whole if n == 1 else largest
        into[0] = T.max(into[0], key)

    for_chunks(width, v.lanes, 1, widest)
    top = T.Bind(v.unkey(T.Bind(T.max(whole[0], v.reduce_key(largest[0], v.lanes))), 1))
    inverse = T.Bind(T.call_extern("float32", "moec_codes_inverse", top))
    T.buffer_store(scales, T.Bind(top / T.float32(127)), list(at))

    def put(place: Expr, n: int, _: int) -> None:
        value = v.load(new[(*row, place)], dtype, n) * v.splat(inverse, n)
        address = T.address_of(cache[(*at, place)])
        T.evaluate(T.call_extern("void", f"moec_codes_store_{n}", address, value))

    for_chunks(width, v.lanes, 1, put)
