"""Rows into the order of slots, rows times their weights, rows into e4m3 or int8: what GEMMs read that take no plain x.

Call: kernel(x, [slot_order,] [weights, [shared_weight,]] y, [scale]): y[r] = x[slot_order[r] // slots_per_token], or
x[r] without gather. weighted: times the slot's weight in f32, rounded to bf16 (weight_on_input of moec::experts).
quantise: y is e4m3 or int8, and scale f32[rows, width / block] (f32[rows] where a row has one scale) the largest
magnitude / 448 or / 127 (1 for zeros): y * scale is x. Rounds to nearest even; NaN and infinity show in the scale.
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
    pack_bf16,
    size,
    store_words,
    tensor,
    threads_of_row,
    warp_reduce,
    when,
)
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem

CHUNK = 8  # bf16 in 16 bytes: what one thread loads at a time
LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}


@dataclasses.dataclass(frozen=True)
class RowsProblem:
    """width: of a row. slots_per_token: of the gather, 0 for rows that stay where they are.

    dtype: of the codes, "float8_e4m3fn" or "int8", where quantise. block: values that share a scale, 0 (a row) or 128.
    weighted: with gather; num_shared and has_shared_weight as in moec::experts.
    """

    width: int
    slots_per_token: int = 0
    quantise: bool = False
    dtype: str = "float8_e4m3fn"
    block: int = 0
    weighted: bool = False
    num_shared: int = 0
    has_shared_weight: bool = False

    def refusal(self) -> str | None:
        """Why the kernel does not take the problem, or None."""
        if self.width % CHUNK or not CHUNK <= self.width <= 32768:
            return f"rows of {self.width}, not a multiple of {CHUNK} up to 32768"
        if self.dtype not in LARGEST or self.block not in (0, 128) or self.width % (self.block or 1):
            return f"{self.dtype} in blocks of {self.block} of {self.width}; {' or '.join(LARGEST)}, whole rows or 128"
        if self.weighted and not self.slots_per_token:
            return "weights without a gather: a row has no slot"
        return None if self.slots_per_token or self.quantise else "nothing to do: neither a gather nor a quantisation"


def build(problem: RowsProblem) -> Any:
    """The TIRx function."""
    return define(lambda: _Rows(problem).emit())


class _Rows:
    """The emitter; a thread's words of chunk c are words[4c .. 4c+3]."""

    def __init__(self, problem: RowsProblem) -> None:
        self.problem, self.threads = problem, threads_of_row(problem.width)

    def emit(self) -> None:
        p, width, threads = self.problem, self.problem.width, self.threads
        x_rows, rows = size("x_rows"), size("rows")
        x = tensor("x", (x_rows, width), "bfloat16")
        order = tensor("slot_order", (rows,), "int32") if p.slots_per_token else None
        weights = tensor("weights", (x_rows, p.slots_per_token - p.num_shared), "float32") if p.weighted else None
        shared_weight = tensor("shared_weight", (x_rows,), "float32") if p.has_shared_weight and p.weighted else None
        y = tensor("y", (rows, width), p.dtype if p.quantise else "bfloat16")
        scale = tensor("scale", (rows, width // p.block if p.block else 1), "float32") if p.quantise else None
        T.device_entry()
        self.row, self.thread = T.cta_id([rows]), T.thread_id([threads])
        shared = T.alloc_buffer((threads // 32,), "float32", scope="shared")
        slot = None if order is None else T.Bind(order[self.row])
        source = self.row if slot is None else T.Bind(slot // p.slots_per_token)
        factor = None
        if weights is not None and slot is not None:
            factor = slot_weight(p, weights, shared_weight, source, slot % p.slots_per_token)
        self.columns = [(c * threads + self.thread) * CHUNK for c in range(-(-width // (CHUNK * threads)))]
        self.words = Local(4 * len(self.columns), "uint32", "words")
        for c, column in enumerate(self.columns):
            with when(column < width):
                load_words(self.words, 4 * c, 4, x.ptr_to([source, column]))
                if factor is not None:
                    self._weigh(c, factor)
                if scale is None:
                    store_words(y.ptr_to([self.row, column]), [self.words[4 * c + i] for i in range(4)])
        if scale is not None:
            self._quantise(y, scale, shared)

    def _weigh(self, c: int, factor: Expr) -> None:
        for i in range(4 * c, 4 * c + 4):
            low, high = low_half(self.words[i]), high_half(self.words[i])
            self.words[i] = pack_bf16(low * factor, high * factor)

    def _quantise(self, y: Any, scale: Any, shared: Any) -> None:
        p, largest = self.problem, Local(1, name="largest")
        if p.block:
            for c, column in enumerate(self.columns):
                largest.fill(0)
                self._greatest(largest, c, column)
                warp_reduce(largest, 0, _greater, p.block // CHUNK)  # the threads of a block of values
                self._write(y, scale, c, column, self._step(largest[0]), column // p.block)
            return
        largest.fill(0)
        for c, column in enumerate(self.columns):
            self._greatest(largest, c, column)
        block_reduce(largest, _greater, shared, self.threads)
        step = self._step(largest[0])
        for c, column in enumerate(self.columns):
            self._write(y, scale, c, column, step, T.int32(0))

    def _greatest(self, largest: Local, c: int, column: Expr) -> None:
        with when(column < self.problem.width):
            for value in _values(self.words, c):
                largest[0] = _greater(largest[0], value)

    def _step(self, largest: Expr) -> Expr:
        top = T.float32(LARGEST[self.problem.dtype])
        return T.Bind(T.Select(largest == T.float32(0), T.float32(1), largest / top))

    def _write(self, y: Any, scale: Any, c: int, column: Expr, step: Expr, block: Expr) -> None:
        pack = pack_e4m3 if self.problem.dtype == "float8_e4m3fn" else pack_int8
        with when(column < self.problem.width):
            values = [value / step for value in _values(self.words, c)]
            store_words(y.ptr_to([self.row, column]), [pack(values[:4]), pack(values[4:])])
            with when(column % (self.problem.block or self.problem.width) == 0):
                T.buffer_store(scale, step, [self.row, block])


def slot_weight(problem: RowsProblem | GemmProblem, weights: Any, shared_weight: Any, token: Expr, k: Expr) -> Expr:
    """What the k-th expert of a token counts: weights[token, k], and of shared experts their weight or 1."""
    top_k = problem.slots_per_token - problem.num_shared
    if not problem.num_shared:
        return T.Bind(weights[token, k])
    shared = T.float32(1) if shared_weight is None else shared_weight[token]
    return T.Bind(T.if_then_else(k < top_k, weights[token, T.min(k, T.int32(top_k - 1))], shared))


def _values(words: Local, c: int) -> list[Expr]:
    return [half(words[4 * c + i]) for i in range(4) for half in (low_half, high_half)]


def _greater(a: Expr, b: Expr) -> Expr:
    """The greater magnitude; NaN once seen stays, and makes the scale NaN."""
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


def pack_int8(values: list[Expr]) -> Expr:
    """Four f32 -> a word of int8, rounded to nearest even, saturated."""
    source = """
__device__ __forceinline__ unsigned moec_pack_int8(float a, float b, float c, float d) {
  float v[4] = {a, b, c, d};
  unsigned word = 0;
  for (int i = 0; i < 4; i++) {
    int whole = (int)rintf(fminf(fmaxf(v[i], -127.0f), 127.0f));
    word |= (unsigned)(whole & 0xff) << (8 * i);
  }
  return word;
}
"""
    return device("moec_pack_int8", "uint32", source, *values)
