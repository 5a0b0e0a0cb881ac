"""Building blocks that TIR lacks: bf16 loads and stores, the processor's dot product, AMX tiles, an atomic counter.

They are LLVM-IR functions that are inlined into the kernel; their text is in intrinsics_text.py. A kernel opens
`with intrinsics(level):` once and calls the wrappers inside it, in an IRBuilder scope. Loads and stores need no
alignment. lanes: 8 (AVX2) or 16 (AVX-512).
"""

from __future__ import annotations

from typing import Any

from tvm.ir import PointerType, PrimType
from tvm.tirx.script import builder as T

from moec.compiler.kernels.template.intrinsics_text import HAS_DOT_BF16, definitions


def has_dot(level: str) -> bool:
    """The processor adds products of pairs of bf16 and of fours of bytes."""
    return level in HAS_DOT_BF16


def has_fields(level: str) -> bool:
    """The processor multiplies every byte with a matrix of bits and looks bytes up in tables of 64."""
    return level == "amx_bf16"


def lanes_of(level: str) -> int:
    """f32 lanes of the widest vector register of an instruction-set level."""
    return 8 if level == "avx2" else 16


def intrinsics(level: str, more: str = "") -> Any:
    """A `with` scope of the function being built for the wrappers of this module. more: LLVM IR of others."""
    return T.attr(T.int32(0), "pragma_import_llvm", definitions(level) + more)


def view(address: Any, dtype: str, num_elements: Any) -> Any:
    """A flat buffer of another dtype over memory that starts at an address."""
    pointer = T.Bind(T.call_extern(PointerType(PrimType(dtype)), "moec_pointer", address))
    return T.decl_buffer((num_elements,), dtype, data=pointer, align=4)


def let(value: Any) -> Any:
    """A variable for an i32 or i64 value that TVM's simplifier does not look through.

    With plain bindings it expands address arithmetic again and again: a kernel takes a minute to build, not a second.
    """
    return T.Bind(T.call_extern(str(value.ty), f"moec_let_{value.ty}", value))


def load_bf16(address: Any, lanes: int = 1) -> Any:
    """bf16 values at an address, widened to f32."""
    if lanes == 1:
        return T.call_extern("float32", "moec_load_bf16", address)
    return T.call_extern(f"float32x{lanes}", f"moec_load_bf16_x{lanes}", address)


def store_bf16(address: Any, value: Any, lanes: int = 1) -> None:
    """Rounds f32 values to nearest even, NaN stays NaN, and stores them."""
    name = "moec_store_bf16" if lanes == 1 else f"moec_store_bf16_x{lanes}"
    T.evaluate(T.call_extern("int32", name, address, value))


def load_i32(address: Any, lanes: int = 1) -> Any:
    """32-bit words at an address."""
    if lanes == 1:
        return T.call_extern("int32", "moec_load_i32", address)
    return T.call_extern(f"int32x{lanes}", f"moec_load_i32_x{lanes}", address)


def store_i32(address: Any, value: Any, lanes: int) -> None:
    """Stores 32-bit words."""
    T.evaluate(T.call_extern("int32", f"moec_store_i32_x{lanes}", address, value))


def load_f32(address: Any, lanes: int) -> Any:
    """f32 values at an address."""
    return T.call_extern(f"float32x{lanes}", f"moec_load_f32_x{lanes}", address)


def store_f32(address: Any, value: Any, lanes: int) -> None:
    """Stores f32 values."""
    T.evaluate(T.call_extern("int32", f"moec_store_f32_x{lanes}", address, value))


def _suffix(lanes: int) -> str:
    return "" if lanes == 1 else f"_x{lanes}"


def _kind(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def magnitude(value: Any, lanes: int) -> Any:
    """|f32 value| as an integer of the same order, NaN above all."""
    return T.Bind(T.call_extern(_kind("int32", lanes), f"moec_magnitude{_suffix(lanes)}", value))


def max_i32(left: Any, right: Any, lanes: int) -> Any:
    """The greater of two integers."""
    return T.call_extern(_kind("int32", lanes), f"moec_max_i32{_suffix(lanes)}", left, right)


def store_i8(address: Any, value: Any, lanes: int) -> None:
    """Rounds f32 values of magnitude 127 at most to integers (ties to even) and stores 8 bits; NaN: some number."""
    T.evaluate(T.call_extern("int32", f"moec_store_i8{_suffix(lanes)}", address, value))


def store_split(high: Any, low: Any, values: Any) -> None:
    """Rounds 16 f32 values of magnitude 32639 at most to integers and stores their high and low bytes; see _SPLIT."""
    T.evaluate(T.call_extern("int32", "moec_store_split_x16", high, low, values))


def from_i32(value: Any, lanes: int) -> Any:
    """i32 -> f32."""
    return T.call_extern(_kind("float32", lanes), f"moec_from_i32{_suffix(lanes)}", value)


def greatest(values: Any, lanes: int) -> Any:
    """The greatest i32 of a vector."""
    return T.call_extern("int32", f"moec_greatest_x{lanes}", values)


def total(values: Any, lanes: int, dtype: str) -> Any:
    """The sum of a vector of int32 or float32."""
    return T.call_extern(dtype, f"moec_total_{'i32' if dtype == 'int32' else 'f32'}_x{lanes}", values)


def load_i8(address: Any, lanes: int) -> Any:
    """Signed bytes at an address, widened to i32."""
    return T.call_extern(f"int32x{lanes}", f"moec_load_i8_x{lanes}", address)


def load_u8(address: Any, lanes: int) -> Any:
    """Unsigned bytes at an address, as f32."""
    return T.call_extern(f"float32x{lanes}", f"moec_load_u8_x{lanes}", address)


def low_bf16(words: Any, lanes: int) -> Any:
    """The bf16 value in the low half of each 32-bit word, as f32."""
    return T.call_extern(f"float32x{lanes}", f"moec_low_bf16_x{lanes}", words)


def high_bf16(words: Any, lanes: int) -> Any:
    """The bf16 value in the high half of each 32-bit word, as f32."""
    return T.call_extern(f"float32x{lanes}", f"moec_high_bf16_x{lanes}", words)


def dot_bf16(total: Any, left_words: Any, right_words: Any) -> Any:
    """total + the two products of the bf16 pairs in each word; 16 lanes, levels avx512_bf16 and up.

    The processor flushes subnormal inputs and results to zero and rounds once per pair.
    """
    return T.call_extern("float32x16", "moec_dot_bf16_x16", total, left_words, right_words)


def fetch_add(address: Any, increment: int) -> Any:
    """Atomically adds to the i32 at an address and gives the value before."""
    return T.call_extern("int32", "moec_fetch_add", address, increment)


def num_threads() -> Any:
    """i32: threads that a parallel loop started here gets (codegen/shim.c)."""
    return T.call_extern("int32", "moec_num_threads")


def limit_threads(most: Any) -> None:
    """Bounds the threads of the parallel loops that follow (i32; 0: no bound), until the next call of this."""
    T.evaluate(T.call_extern("int32", "moec_limit_threads", most))


def prefetch(address: Any, locality: int = 2) -> None:
    """Asks for a cache line for reading. locality: 3 into L1, 2 into L2, 0 past L2. Any address is allowed."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, T.int32(0), T.int32(locality), T.int32(1)))


def tile_config(address: Any) -> None:
    """Loads the 64-byte AMX tile configuration and zeroes all tiles; per thread, so inside the parallel body."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.ldtilecfg", address))


def tile_release() -> None:
    """Gives the AMX tile registers back."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilerelease"))


def tile_zero(tile: int) -> None:
    """Sets a tile to zero."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilezero", T.int8(tile)))


def tile_load(tile: int, address: Any, stride_bytes: Any) -> None:
    """Loads the configured rows of a tile, stride_bytes (i64) apart."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tileloadd64", T.int8(tile), address, stride_bytes))


def tile_store(tile: int, address: Any, stride_bytes: Any) -> None:
    """Stores the configured rows of a tile, stride_bytes (i64) apart."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilestored64", T.int8(tile), address, stride_bytes))


def tile_dot_int8(total: int, left: int, right: int) -> None:
    """total += left x right; left: rows of signed bytes, right: unsigned bytes, four k of a column together; i32."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tdpbsud", T.int8(total), T.int8(left), T.int8(right)))


def tile_dot_bf16(total: int, left: int, right: int) -> None:
    """total += left x right; left: rows of bf16 pairs, right: pairs along k interleaved by column, total: f32."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tdpbf16ps", T.int8(total), T.int8(left), T.int8(right)))
