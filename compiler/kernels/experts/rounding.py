"""Rows of activations as integers, int8 or int16: one scale for a row, and the sums of a row over groups.

scale = largest magnitude / 127 (int16: / 32639, times the spacing of the weights' numbers); a row of zeros has scale 0,
a row with NaN or infinity a scale that is NaN or infinite, so that it spoils its own row of the output and no other.
sum: of the rounded numbers of a group.

int16 rows are two planes of signed bytes, number = 256 * high + low, that meet the codes one after the other. Where the
formats of the weights ask for no rounding they stand for bf16 rows: they are off by 2**-16 of the row's largest number
at most. A row's largest number is at most sqrt(K) times its root mean square, so relative to the whole row that is
4e-4 at K = 2048 in the worst case and 4e-5 for normal rows; bf16's own rounding is 1.1e-3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.codes import INT8_MOST, INT8_STEP, INT16_MOST
from moec.compiler.kernels.experts.layout import HALF
from moec.compiler.kernels.experts.plan import Plan, Side
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.flow import Scalar

_TINY = 1e-30  # keeps 127 / largest finite for a row of zeros


@dataclasses.dataclass(frozen=True)
class PackedRow:
    """One row of packed rows: its number, its first element, elements from one k step to the next, its block.

    place: number in the block of rows that lie together; block_rows: how many do.
    """

    rows: Any
    index: Any
    base: Any
    stride: Any
    place: Any
    block_rows: Any

    def at(self, k: Any, step: int) -> Any:
        """The element of a k."""
        return self.base + T.floordiv(k, step) * self.stride + T.floormod(k, step)

    def at_plane(self, k: Any, plane: int) -> Any:
        """The 16-bit element where a plane of int16 rows has an even k; stride: half a k step, one plane's rows."""
        step = INT8_STEP
        return self.base + (T.floordiv(k, step) * 2 + plane) * self.stride + T.floordiv(T.floormod(k, step), 2)


def wide_at(inner: int, row: Any, block_rows: Any, k: Any) -> Any:
    """Element of h_wide where k of a row in a block of rows begins: [block][F padded / 16][row][16].

    row: (first row of the block, number in the block). A panel's results for a block are whole cache lines that follow
    those of the panel before; row by row they would be halves of lines, each a line's trip from memory.
    """
    first, place = row
    across = T.Cast("int64", T.floordiv(k, HALF)) * (T.Cast("int64", block_rows) * HALF)
    return T.Cast("int64", first) * inner + across + T.Cast("int64", place) * HALF + T.floormod(k, HALF)


def emit_rounded_row(
    plan: Plan, side: Side, source: Callable[[Any, int], Any], width: int, row: PackedRow, scales: Any
) -> None:
    """source(k, lanes) for k < width -> int8 in `row`, zeros up to the stack's depth, and scales[row.index]."""
    lanes, depth = plan.lanes, side.depth
    whole, tail = width // lanes, width % lanes
    largest = _emit_largest(plan, source, width)
    T.buffer_store(scales, largest * T.float32(1 / INT8_MOST), [row.index])
    inverse = _inverse(largest, INT8_MOST)
    with T.serial(whole) as v:
        k = ins.let(T.Cast("int64", v) * lanes)
        target = T.address_of(row.rows[row.at(k, plan.step)])
        ins.store_i8(target, source(k, lanes) * T.broadcast(inverse, lanes), lanes)
    with T.serial(depth - whole * lanes) as t:
        k = ins.let(T.Cast("int64", t) + whole * lanes)
        T.buffer_store(row.rows, T.int8(0), [row.at(k, plan.step)])
    with T.serial(tail) as t:
        k = ins.let(T.Cast("int64", t) + whole * lanes)
        ins.store_i8(T.address_of(row.rows[row.at(k, plan.step)]), source(k, 1) * inverse, 1)


def _emit_largest(plan: Plan, source: Callable[[Any, int], Any], width: int) -> Any:
    """The largest magnitude of source(k, lanes) for k < width, in f32."""
    lanes = plan.lanes
    whole, tail = width // lanes, width % lanes
    largest = T.alloc_buffer((lanes,), "int32", align=64)
    place = T.ramp(0, 1, lanes)
    T.buffer_store(largest, T.broadcast(T.int32(0), lanes), [place])
    with T.serial(whole) as v:
        value = ins.magnitude(source(ins.let(T.Cast("int64", v) * lanes), lanes), lanes)
        T.buffer_store(largest, ins.max_i32(largest[place], value, lanes), [place])
    found = Scalar("int32", ins.greatest(largest[place], lanes))
    with T.serial(tail) as t:
        found.set(ins.max_i32(found.value, ins.magnitude(source(T.int64(whole * lanes) + t, 1), 1), 1))
    return T.Bind(T.reinterpret("float32", found.value))


def _inverse(largest: Any, most: int) -> Any:
    """What a row's numbers are multiplied by."""
    return T.Bind(T.float32(float(most)) / T.max(T.float32(_TINY), largest))


def emit_split_row(
    plan: Plan, side: Side, source: Callable[[Any, int], Any], width: int, row: PackedRow, scales: Any
) -> None:
    """source(k, lanes) for k < width -> int16 in the two planes of `row`, zeros up to the stack's depth, and its scale.

    The scale is that of products with the stack's codes: it has the spacing of their numbers.
    """
    lanes = plan.lanes
    whole, tail = width // lanes, width % lanes
    largest = _emit_largest(plan, source, width)
    T.buffer_store(scales, largest * T.float32(side.coded.spacing / INT16_MOST), [row.index])
    inverse = _inverse(largest, INT16_MOST)

    def store(k: Any, values: Any) -> None:
        high, low = (T.address_of(row.rows[row.at_plane(k, plane)]) for plane in range(2))
        ins.store_split(high, low, values)

    with T.serial(whole) as v:
        k = ins.let(T.Cast("int64", v) * lanes)
        store(k, source(k, lanes) * T.broadcast(inverse, lanes))
    if tail:
        last = T.alloc_buffer((lanes,), "float32", align=64)
        place = T.ramp(0, 1, lanes)
        T.buffer_store(last, T.broadcast(T.float32(0), lanes), [place])
        with T.serial(tail) as t:
            T.buffer_store(last, source(T.Cast("int64", t) + whole * lanes, 1) * inverse, [t])
        store(T.int64(whole * lanes), last[place])
    done = whole + (1 if tail else 0)
    with T.serial(side.depth // lanes - done) as v:
        store(ins.let((T.Cast("int64", v) + done) * lanes), T.broadcast(T.float32(0), lanes))


def emit_sums(plan: Plan, side: Side, row: PackedRow, group: int, sums: Any) -> None:
    """Sums of each `group` numbers of a packed row -> sums[row.index, group number], as Side.sum_factor says."""
    lanes, planes, count = plan.lanes, side.planes, -(-side.depth // group)
    dtype = "int32" if planes else "float32"
    place = T.ramp(0, 1, lanes)
    with T.serial(count) as g:
        added = T.alloc_buffer((lanes,), dtype, align=64)
        T.buffer_store(added, T.broadcast(T.Cast(dtype, T.int32(0)), lanes), [place])
        start = ins.let(T.Cast("int64", g) * group)
        with T.serial(T.floordiv(T.min(side.depth - start, group), lanes)) as v:
            k = ins.let(start + T.Cast("int64", v) * lanes)
            T.buffer_store(added, added[place] + _load(plan, row, k, planes), [place])
        result = ins.total(added[place], lanes, dtype)
        if side.sum_factor:
            result = T.reinterpret("float32", result * T.int32(side.sum_factor))
        elif planes:
            result = ins.from_i32(result, 1)
        T.buffer_store(sums, result, [T.Cast("int64", row.index) * count + g])


def _load(plan: Plan, row: PackedRow, k: Any, planes: int) -> Any:
    if planes == 2:
        high, low = (ins.load_i8(T.address_of(row.rows[row.at_plane(k, plane)]), plan.lanes) for plane in range(2))
        return high * T.broadcast(T.int32(256), plan.lanes) + low
    address = T.address_of(row.rows[row.at(k, plan.step)])
    if planes:
        return ins.load_i8(address, plan.lanes)
    return (ins.load_bf16 if plan.row_dtype == "bfloat16" else ins.load_f32)(address, plan.lanes)
