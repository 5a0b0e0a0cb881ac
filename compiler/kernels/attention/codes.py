"""Keys and values as int8 codes with a float32 scale for each token and head: writing rows of a cache.

The arithmetic is that of passes/ir/cache_ops.py, step by step in float32, so that the codes are the same.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.simd import Expr, Registers, Simd, for_chunks
from moec.compiler.kernels.simd_text import constant

INVERSE = """
define linkonce_odr float @moec_codes_inverse(float %x) alwaysinline {{
  %some = fcmp ogt float %x, {zero}
  %a = fdiv float {largest}, %x
  %b = select i1 %some, float %a, float {zero}
  ret float %b
}}
""".format(zero=constant(0.0), largest=constant(127.0))


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
        v.store(cache[(*at, place)], value, "int8", n)

    for_chunks(width, v.lanes, 1, put)
