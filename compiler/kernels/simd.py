"""Vector building blocks for TIR kernels: loads, stores, bf16 rounding, reductions and functions, inlined as LLVM-IR
text (simd_text.py).

Kernels are built with TVM's IRBuilder in plain Python. Everything that touches a tensor goes through a pointer and an
unaligned load or store here, for two reasons: TVM assumes 64-byte alignment unless told otherwise and never checks
it, and its bf16 legalisation rewrites bf16 vectors behind one's back. Scratch arrays use scope "global": in TVM 0.27
that is a stack allocation below 1024 bytes, whereas "local" becomes a heap allocation per loop iteration.

A value of n lanes has dtype "float32xN"; n = 1 is a scalar, so that tails are written as the body with lanes 1.
"""

from __future__ import annotations

import builtins
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.simd_text import SCALARS, functions
from moec.compiler.kernels.template.intrinsics_text import DOT_BF16
from moec.runtime.launch.cpu_features import LEVELS

Expr = Any

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_SHORT = {"float32": "f32", "bfloat16": "bf16", "int8": "i8"}


def lanes_of(dtype: str, n: int) -> str:
    """("float32", 16) -> "float32x16"; n = 1 is the scalar type."""
    return dtype if n == 1 else f"{dtype}x{n}"


@dataclasses.dataclass(frozen=True)
class Simd:
    """The vector unit of one instruction-set level. lanes: float32 values per register.

    native_bf16: it rounds to bf16.  pair_products: it multiplies pairs of bf16 at the rate of float32 numbers.
    """

    lanes: int
    native_bf16: bool
    pair_products: bool = False

    @classmethod
    def of(cls, level: str) -> Simd:
        """level: a key of cpu_features.LEVELS."""
        features = LEVELS[level]
        native, tiles = "avx512_bf16" in features, any(f.startswith("amx") for f in features)
        # Processors with AMX multiply pairs at half the rate: on Sapphire Rapids they were no faster up to 4 tokens,
        # and up to 15 % slower from 8 on. Zen 5 does them at the whole rate.
        return cls(16 if "avx512f" in features else 8, native, native and not tiles)

    def exact(self) -> Simd:
        """The same without the processor's rounding to bf16, which takes subnormal numbers for zero."""
        return dataclasses.replace(self, native_bf16=False)

    def _suffix(self, n: int) -> str:
        return f"{n}_native" if self.native_bf16 and n >= 8 else str(n)

    @contextmanager
    def prelude(self, *more_lanes: int, text: str = "") -> Iterator[None]:
        """Everything inside may call the functions for 1, `lanes` and more_lanes lanes, and those of `text`."""
        widths = sorted({1, self.lanes, *more_lanes})
        pairs = DOT_BF16 if self.pair_products else ""
        ir = SCALARS + "".join(functions(n, self.native_bf16 and n >= 8) for n in widths) + pairs + text
        with T.attr(T.int32(0), "pragma_import_llvm", ir):
            yield

    def load(self, at: Expr, dtype: str, n: int) -> Expr:
        """n values from an element (a buffer load), widened to float32. dtype: float32, bfloat16 or int8."""
        name = _SHORT[dtype]
        return T.Bind(T.call_extern(lanes_of("float32", n), f"moec_simd_load_{name}_{n}", T.address_of(at)))

    def store(self, at: Expr, value: Expr, dtype: str, n: int) -> None:
        """Writes n float32 values to an element, rounded to dtype; int8 takes the nearest it has, and 0 for NaN."""
        name = f"bf16_{self._suffix(n)}" if dtype == "bfloat16" else f"{_SHORT[dtype]}_{n}"
        T.evaluate(T.call_extern("void", f"moec_simd_store_{name}", T.address_of(at), value))

    def load_nibbles(self, at: Expr, n: int) -> tuple[Expr, Expr]:
        """n bytes from an element -> their low and their high four bits, each less 8, as float32."""
        kind, address = lanes_of("float32", n), T.address_of(at)
        low, high = (T.call_extern(kind, f"moec_simd_load_{part}_i4_{n}", address) for part in ("low", "high"))
        return T.Bind(low), T.Bind(high)

    def load_pairs(self, at: Expr, dtype: str, n: int) -> tuple[Expr, Expr]:
        """2n values from an element -> those at even and those at odd places, each float32 of n lanes; n > 1."""
        kind, address = lanes_of("float32", n), T.address_of(at)
        if dtype == "float32":
            even, odd = (T.call_extern(kind, f"moec_simd_load_f32_{name}_{n}", address) for name in ("even", "odd"))
        else:
            raw = T.Bind(T.call_extern(lanes_of("int32", n), f"moec_simd_load_i32_{n}", address))
            even, odd = (T.call_extern(kind, f"moec_simd_{name}_{n}", raw) for name in ("even", "odd"))
        return T.Bind(even), T.Bind(odd)

    def load_words(self, at: Expr, n: int) -> Expr:
        """n pairs of bf16 from an element, each in an int32: what dot_pairs takes."""
        return T.Bind(T.call_extern(lanes_of("int32", n), f"moec_simd_load_i32_{n}", T.address_of(at)))

    def dot_pairs(self, total: Expr, left: Expr, right: Expr) -> Expr:
        """total (float32 of `lanes`) + the two products of each pair; subnormal numbers count as zero.

        For processors with pair_products.
        """
        return T.call_extern(lanes_of("float32", self.lanes), "moec_dot_bf16_x16", total, left, right)

    def store_pairs(self, at: Expr, even: Expr, odd: Expr, dtype: str, n: int) -> None:
        """The inverse of load_pairs, rounding to dtype."""
        name = f"bf16_pairs_{self._suffix(n)}" if dtype == "bfloat16" else f"f32_pairs_{n}"
        T.evaluate(T.call_extern("void", f"moec_simd_store_{name}", T.address_of(at), even, odd))

    def rounded(self, value: Expr, dtype: str, n: int) -> Expr:
        """value rounded to dtype and back to float32; unchanged for float32."""
        if dtype == "float32":
            return value
        return T.Bind(T.call_extern(lanes_of("float32", n), f"moec_simd_round_bf16_{self._suffix(n)}", value))

    def call(self, name: str, value: Expr, n: int) -> Expr:
        """exp, sigmoid or tanh of n lanes."""
        return T.Bind(T.call_extern(lanes_of("float32", n), f"moec_simd_{name}_{n}", value))

    def reduce(self, name: str, value: Expr, n: int) -> Expr:
        """sum (in any order) or max (NaN wins) over n lanes."""
        return value if n == 1 else T.Bind(T.call_extern("float32", f"moec_simd_{name}_{n}", value))

    def transpose_sum(self, vectors: Sequence[Expr]) -> Expr:
        """`lanes` vectors -> one, whose lane i is the sum of vector i."""
        name = f"moec_simd_transpose_sum_{self.lanes}"
        return T.Bind(T.call_extern(lanes_of("float32", self.lanes), name, *vectors))

    def opaque(self, value: Expr) -> Expr:
        """An int64 that TVM does not look through: its analysis of indices in nested loops can take minutes."""
        return T.Bind(T.call_extern("int64", "moec_simd_opaque", value))

    def prefetch(self, at: Expr) -> None:
        """Asks for the cache line of an element, into the second level. Any address is safe."""
        T.evaluate(T.call_extern("void", "moec_simd_prefetch", T.address_of(at)))

    def key(self, value: Expr, n: int) -> Expr:
        """int32 that orders as routing does: -0 equals +0, NaN above everything."""
        return T.Bind(T.call_extern(lanes_of("int32", n), f"moec_simd_key_{n}", value))

    def unkey(self, key: Expr, n: int) -> Expr:
        """The inverse of key (of -0: +0; of NaN: a NaN)."""
        return T.Bind(T.call_extern(lanes_of("float32", n), f"moec_simd_unkey_{n}", key))

    def reduce_key(self, keys: Expr, n: int) -> Expr:
        """The greatest of n keys."""
        return T.Bind(T.call_extern("int32", f"moec_simd_max_key_{n}", keys))

    def first_place(self, keys: Expr, places: Expr, key: Expr, n: int) -> Expr:
        """The smallest of n places whose key is `key`; one must be."""
        return T.Bind(T.call_extern("int32", f"moec_simd_first_{n}", keys, places, key))

    def splat(self, value: Expr, n: int) -> Expr:
        """n times the value."""
        return value if n == 1 else T.broadcast(value, n)


class Registers:
    """count vectors of a dtype: registers where every index is a Python int, else a small array."""

    def __init__(self, count: int, lanes: int, dtype: str = "float32") -> None:
        self.count, self.lanes, self.dtype = count, lanes, dtype
        self._data = T.alloc_buffer((count * lanes,), dtype, scope="global")

    def _at(self, i: Expr) -> Expr:
        return i * self.lanes if self.lanes == 1 else T.ramp(i * self.lanes, 1, self.lanes)

    def __getitem__(self, i: Expr) -> Expr:
        return self._data[self._at(i)]

    def __setitem__(self, i: Expr, value: Expr) -> None:
        T.buffer_store(self._data, value, [self._at(i)])

    def element(self, i: Expr) -> Expr:
        """The i-th single value."""
        return self._data[i]

    def set_element(self, i: Expr, value: Expr) -> None:
        """Stores the i-th single value."""
        T.buffer_store(self._data, value, [i])

    def range(self, start: Expr, n: int) -> Expr:
        """n values from any place on."""
        return self._data[start if n == 1 else T.ramp(start, 1, n)]

    def set_range(self, start: Expr, n: int, value: Expr) -> None:
        """Stores n values from any place on."""
        T.buffer_store(self._data, value, [start if n == 1 else T.ramp(start, 1, n)])

    def fill(self, value: float | int) -> None:
        """Every value."""
        one = T.float32(value) if self.dtype == "float32" else T.int32(value)
        for i in builtins.range(self.count):
            self[i] = one if self.lanes == 1 else T.broadcast(one, self.lanes)


class Sums(Registers):
    """count vectors of float32, each a variable of its own: every index is a Python int.

    An array of 16 vectors of 16 lanes would be a block on the heap, written in every turn of a loop.
    """

    def __init__(self, count: int, lanes: int) -> None:
        self.count, self.lanes, self.dtype = count, lanes, "float32"
        self._each = [Registers(1, lanes) for _ in builtins.range(count)]

    def __getitem__(self, i: int) -> Expr:
        return self._each[i][0]

    def __setitem__(self, i: int, value: Expr) -> None:
        self._each[i][0] = value


def match(name: str, dtype: str, shape: tuple[Expr, ...], strided: int = 0) -> Expr:
    """A tensor argument. The first `strided` axes may have any stride, the others are contiguous."""
    # TVM compares sizes with the tensor's int64 ones and refuses an int32 constant
    shape = tuple(T.int64(size) if isinstance(size, int) else size for size in shape)
    strides: list[Expr] | None = None
    if strided:
        inner: list[Expr] = [T.int64(1)]
        for size in reversed(shape[strided + 1 :]):
            inner.insert(0, inner[0] * size)
        strides = [T.int64() for _ in range(strided)] + inner
    handle = T.arg(name, T.handle())
    return T.match_buffer(handle, shape, dtype, strides=strides, align=DTYPE_BYTES.get(dtype, 4))


def for_chunks(length: Expr, lanes: int, unroll: int, body: Callable[[Expr, int, int], None]) -> None:
    """body(offset, lanes, u) over range(length): blocks of unroll vectors (u < unroll), single vectors, scalars."""
    block = lanes * unroll

    def loop(start: Expr, count: Expr, step: int, width: int, copies: int) -> None:
        if isinstance(count, int) and count == 0:
            return
        with T.serial(count) as b:
            for u in range(copies):
                body(start + b * step + u * width, width, u)

    if unroll > 1:
        loop(0, length // block, block, lanes, unroll)
    done = length // block * block if unroll > 1 else 0
    loop(done, (length - done) // lanes, lanes, lanes, 1)
    if lanes > 1:
        loop(length // lanes * lanes, length % lanes, 1, 1, 1)


def for_rows(count: Expr, small: Expr, body: Callable[[Expr], None]) -> None:
    """body(i) for i in range(count): on this thread where `small` holds, else on all threads."""
    with T.If(small):
        with T.Then(), T.serial(count) as i:
            body(i)
        with T.Else(), T.parallel(count) as i:
            body(i)
