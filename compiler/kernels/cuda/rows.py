"""Rows into the order of slots, rows into e4m3, or both: what the TMA and the fp8 GEMMs read.

Call: kernel(x, [slot_order,] y, [scale]): y[r] = x[slot_order[r] // slots_per_token], or x[r] without gather. With
quantise, y is e4m3 and scale f32[rows] the row's largest magnitude / 448 (1 for a row of zeros): y * scale is x.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.cuda.emit import (
    Expr,
    Local,
    block_reduce,
    define,
    device,
    high_half,
    load_words,
    low_half,
    size,
    store_words,
    tensor,
    threads_of_row,
    when,
)

CHUNK = 8  # bf16 in 16 bytes: what one thread loads at a time
E4M3_MAX = 448.0


@dataclasses.dataclass(frozen=True)
class RowsProblem:
    """width: of a row. slots_per_token: of the gather, 0 for rows that stay where they are."""

    width: int
    slots_per_token: int = 0
    quantise: bool = False

    def refusal(self) -> str | None:
        """Why the kernel does not take the problem, or None."""
        if self.width % CHUNK or not CHUNK <= self.width <= 32768:
            return f"rows of {self.width}, not a multiple of {CHUNK} up to 32768"
        return None if self.slots_per_token or self.quantise else "nothing to do: neither a gather nor a quantisation"


def build(problem: RowsProblem) -> Any:
    """The TIRx function."""
    width, threads = problem.width, threads_of_row(problem.width)

    def body() -> None:
        x_rows, rows = size("x_rows"), size("rows")
        x = tensor("x", (x_rows, width), "bfloat16")
        order = tensor("slot_order", (rows,), "int32") if problem.slots_per_token else None
        y = tensor("y", (rows, width), "float8_e4m3fn" if problem.quantise else "bfloat16")
        scale = tensor("scale", (rows,), "float32") if problem.quantise else None
        T.device_entry()
        row, thread = T.cta_id([rows]), T.thread_id([threads])
        shared = T.alloc_buffer((threads // 32,), "float32", scope="shared")
        source = row if order is None else T.Bind(order[row] // problem.slots_per_token)
        columns = [(c * threads + thread) * CHUNK for c in range(-(-width // (CHUNK * threads)))]
        words, largest = Local(4 * len(columns), "uint32", "words"), Local(1, name="largest")
        largest.fill(0)
        for c, column in enumerate(columns):
            with when(column < width):
                load_words(words, 4 * c, 4, x.ptr_to([source, column]))
                if scale is None:
                    store_words(y.ptr_to([row, column]), [words[4 * c + i] for i in range(4)])
                else:
                    for value in _values(words, c):
                        largest[0] = _greater(largest[0], value)
        if scale is None:
            return
        block_reduce(largest, _greater, shared, threads)
        step = T.Bind(T.Select(largest[0] == T.float32(0), T.float32(1), largest[0] / T.float32(E4M3_MAX)))
        with when(thread == 0):
            T.buffer_store(scale, step, [row])
        for c, column in enumerate(columns):
            with when(column < width):
                values = [value / step for value in _values(words, c)]
                store_words(y.ptr_to([row, column]), [pack_e4m3(values[:4]), pack_e4m3(values[4:])])

    return define(body)


def _values(words: Local, c: int) -> list[Expr]:
    return [half(words[4 * c + i]) for i in range(4) for half in (low_half, high_half)]


def _greater(a: Expr, b: Expr) -> Expr:
    """The greater magnitude; NaN once seen stays, and makes the row's scale NaN."""
    source = """
__device__ __forceinline__ float moec_greater(float a, float b) {
  float c = fabsf(b);
  return !(c <= a) && !(a != a) ? c : a;
}
"""
    return device("moec_greater", "float32", source, a, b)


def pack_e4m3(values: list[Expr]) -> Expr:
    """Four f32 -> a word of e4m3, rounded to nearest even, at most 448."""
    source = """
__device__ __forceinline__ unsigned moec_pack_e4m3(float a, float b, float c, float d) {
  unsigned short low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return (unsigned)low | (unsigned)high << 16;
}
"""
    return device("moec_pack_e4m3", "uint32", source, *values)
