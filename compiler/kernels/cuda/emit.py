"""Short words for what every CUDA kernel emits: registers, conditions, vector loads, warp sums, bf16 in pairs.

A kernel is written with TVM's TIRx builder: plain Python that emits one device function. Python's own `for` and `if`
run while the kernel is made, `T.serial` and `when` are loops and conditions of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

Expr = Any
WARP = 32
FULL_MASK = 0xFFFFFFFF


class Local:
    """An array of registers of one thread."""

    def __init__(self, size: int, dtype: str = "float32", name: str = "") -> None:
        self.buffer = T.alloc_local((size,), dtype)
        self.size, self.dtype = size, dtype
        if name:
            IRBuilder.name(name, self.buffer)

    def __getitem__(self, i: Expr) -> Expr:
        return self.buffer[i]

    def __setitem__(self, i: Expr, value: Expr) -> None:
        T.buffer_store(self.buffer, value, [i])

    def fill(self, value: float) -> None:
        """Every register gets the value."""
        for i in range(self.size):
            self[i] = T.float32(value) if self.dtype == "float32" else T.int32(value)


def define(body: Callable[[], None]) -> Any:
    """The TIRx function that `body` emits."""
    with IRBuilder() as ib, T.prim_func():
        T.func_name("kernel")
        body()
    return ib.get()


def tensor(name: str, shape: Sequence[Expr], dtype: str) -> Any:
    """A contiguous tensor argument, 16-byte aligned."""
    buffer = T.match_buffer(T.arg(name, T.handle()), tuple(shape), dtype, align=16)
    IRBuilder.name(name, buffer)
    return buffer


def rows(name: str, dtype: str, value: bool = False) -> Callable[[Expr, Expr], Expr]:
    """A tensor argument whose rows lie `NAME_stride` elements apart, an argument too: (row, column) -> pointer.

    value: -> the element instead.
    """
    buffer = tensor(name, (size(f"{name}_elements"),), dtype)
    stride = T.arg(f"{name}_stride", T.int32())

    def at(row: Expr, column: Expr) -> Expr:
        place = T.Cast("int64", row) * T.Cast("int64", stride) + column
        return buffer[place] if value else buffer.ptr_to([place])

    return at


def size(name: str) -> Expr:
    """A size that is known at launch."""
    var = T.int32()
    IRBuilder.name(name, var)
    return var


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Emits the body under a condition; threads that do not meet it go on behind it."""
    with T.If(condition), T.Then():
        yield


def do(call: Expr) -> None:
    """Emits a call for its effect."""
    T.evaluate(call)


def ptx(instruction: str, *operands: Expr) -> None:
    """Emits one instruction; the result comes first among the operands."""
    do(T.ptx[instruction](*operands))


def load_words(registers: Local, at: int, count: int, pointer: Expr) -> None:
    """count (1, 2 or 4) words of global memory that this launch does not write."""
    vector = "" if count == 1 else f".v{count}"
    ptx(f"ld.global.nc{vector}.b32", *[registers[at + i] for i in range(count)], pointer)


def store_words(pointer: Expr, words: Sequence[Expr]) -> None:
    """1, 2 or 4 words of 32 bits in one store to global memory; the pointer is aligned to all of them."""
    vector = "" if len(words) == 1 else f".v{len(words)}"
    ptx(f"st.global{vector}.b32", pointer, *words)


def low_half(word: Expr) -> Expr:
    """The first bf16 of a word as f32."""
    return T.reinterpret("float32", T.shift_left(word, T.uint32(16)))


def high_half(word: Expr) -> Expr:
    """The second bf16 of a word as f32."""
    return T.reinterpret("float32", T.bitwise_and(word, T.uint32(0xFFFF0000)))


def pack_bf16(low: Expr, high: Expr) -> Expr:
    """Two f32 -> a word of bf16, rounded to nearest even."""
    source = """
__device__ __forceinline__ unsigned moec_pack_bf16(float low, float high) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
"""
    return T.cuda.func_call("moec_pack_bf16", low, high, source_code=source, return_type="uint32")


def round_bf16(value: Expr) -> Expr:
    """f32 -> the nearest bf16, as f32."""
    return low_half(pack_bf16(value, T.float32(0)))


def device(name: str, returns: str, source: str, *arguments: Expr) -> Expr:
    """A call of a device function whose CUDA text is given."""
    return T.cuda.func_call(name, *arguments, source_code=source, return_type=returns)


def warp_max(value: Expr) -> Expr:
    """The greatest int32 of the warp."""
    source = "__device__ __forceinline__ int moec_warp_max(int v) { return __reduce_max_sync(0xffffffffu, v); }"
    return device("moec_warp_max", "int32", source, value)


def warp_min(value: Expr) -> Expr:
    """The least i32 of a warp's lanes, in every lane."""
    source = "__device__ __forceinline__ int moec_warp_min(int v) { return __reduce_min_sync(0xffffffffu, v); }"
    return device("moec_warp_min", "int32", source, value)


def warp_read(value: Expr, lane: Expr) -> Expr:
    """The value of one lane (f32), in every lane."""
    source = (
        "__device__ __forceinline__ float moec_warp_read(float v, int l) { return __shfl_sync(0xffffffffu, v, l); }"
    )
    return device("moec_warp_read", "float32", source, value, lane)


def warp_sync() -> None:
    """Lanes of a warp wait for each other and see what each wrote to memory."""
    source = "__device__ __forceinline__ void moec_warp_sync() { __syncwarp(); }"
    do(device("moec_warp_sync", "void", source))


def same_lanes(value: Expr) -> Expr:
    """uint32: the lanes of the warp that hold the same int32."""
    source = "__device__ __forceinline__ unsigned moec_same_lanes(int v) { return __match_any_sync(0xffffffffu, v); }"
    return device("moec_same_lanes", "uint32", source, value)


def count_bits(word: Expr) -> Expr:
    """How many bits of a u32 are set."""
    source = "__device__ __forceinline__ int moec_count_bits(unsigned v) { return __popc(v); }"
    return device("moec_count_bits", "int32", source, word)


def shuffle_up(value: Expr, lanes: int) -> Expr:
    """The i32 of the lane that is `lanes` lower; the lowest lanes keep their own."""
    source = (
        "__device__ __forceinline__ int moec_shuffle_up(int v, int d) { return __shfl_up_sync(0xffffffffu, v, d); }"
    )
    return device("moec_shuffle_up", "int32", source, value, T.int32(lanes))


def shuffle_xor(value: Expr, mask: int) -> Expr:
    """The value of the lane whose number differs in the bits of mask."""
    return T.tvm_warp_shuffle_xor(T.uint32(FULL_MASK), value, mask, WARP, WARP)


def warp_reduce(registers: Local, at: int, combine: Callable[[Expr, Expr], Expr], width: int = WARP) -> None:
    """registers[at] of all lanes of a group of `width` combined, in every lane."""
    step = width // 2
    while step:
        registers[at] = combine(registers[at], shuffle_xor(registers[at], step))
        step //= 2


def add(a: Expr, b: Expr) -> Expr:
    """The sum, as warp_reduce and block_reduce take it."""
    return a + b


def sync() -> None:
    """The threads of a block wait for each other and see what each wrote to memory."""
    do(T.cuda.cta_sync())


def threads_of_row(width: int) -> int:
    """Threads of a block that holds a row of bf16 in registers: whole warps, at most 256, 8 values each at a time."""
    return min(256, -(-width // 8 // WARP) * WARP)


def block_reduce(registers: Local, combine: Callable[[Expr, Expr], Expr], shared: Any, threads: int) -> None:
    """registers[0] of all threads of the block combined, in every thread. shared: f32[threads / 32]."""
    warp_reduce(registers, 0, combine)
    if threads == WARP:
        return
    thread = T.thread_id([threads])
    sync()  # the values of an earlier reduction have been read
    with when(thread % WARP == 0):
        T.buffer_store(shared, registers[0], [thread // WARP])
    sync()
    registers[0] = shared[0]
    for w in range(1, threads // WARP):
        registers[0] = combine(registers[0], shared[w])
