"""Rows of activations in int8: one scale for a row, and the sums of a row over groups.

scale = largest magnitude / 127; a row of zeros has scale 0, a row with NaN or infinity a scale that is NaN or infinite,
so that it spoils its own row of the output and no other. sum: of the rounded numbers of a group, exact in f32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.plan import Plan
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.flow import Scalar

_TINY = 1e-30  # keeps 127 / largest finite for a row of zeros


@dataclasses.dataclass(frozen=True)
class PackedRow:
    """One row of packed rows: its number, its first element, and elements from one k step to the next."""

    rows: Any
    index: Any
    base: Any
    stride: Any

    def at(self, k: Any, step: int) -> Any:
        """The element of a k."""
        return self.base + T.floordiv(k, step) * self.stride + T.floormod(k, step)


def emit_rounded_row(
    plan: Plan, source: Callable[[Any, int], Any], width: int, depth: int, row: PackedRow, scales: Any
) -> None:
    """source(k, lanes) for k < width -> int8 in `row`, zeros up to depth, and scales[row.index]."""
    lanes = plan.lanes
    whole, tail = width // lanes, width % lanes
    largest = T.alloc_buffer((lanes,), "int32", align=64)
    place = T.ramp(0, 1, lanes)
    T.buffer_store(largest, T.broadcast(T.int32(0), lanes), [place])
    with T.serial(whole) as v:
        value = ins.magnitude(source(ins.let(T.Cast("int64", v) * lanes), lanes), lanes)
        T.buffer_store(largest, ins.max_i32(largest[place], value, lanes), [place])
    most = Scalar("int32", ins.greatest(largest[place], lanes))
    with T.serial(tail) as t:
        most.set(ins.max_i32(most.value, ins.magnitude(source(T.int64(whole * lanes) + t, 1), 1), 1))
    amax = T.Bind(T.reinterpret("float32", most.value))
    T.buffer_store(scales, amax * T.float32(1 / 127), [row.index])
    inverse = T.Bind(T.float32(127.0) / T.max(T.float32(_TINY), amax))
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


def emit_sums(plan: Plan, row: PackedRow, depth: int, group: int, sums: Any) -> None:
    """Sums of each `group` numbers of a packed row -> sums[row.index, group number]."""
    lanes, count = plan.lanes, -(-depth // group)
    dtype = "int32" if plan.int8 else "float32"
    place = T.ramp(0, 1, lanes)
    with T.serial(count) as g:
        added = T.alloc_buffer((lanes,), dtype, align=64)
        T.buffer_store(added, T.broadcast(T.Cast(dtype, T.int32(0)), lanes), [place])
        start = ins.let(T.Cast("int64", g) * group)
        with T.serial(T.floordiv(T.min(depth - start, group), lanes)) as v:
            at = row.at(ins.let(start + T.Cast("int64", v) * lanes), plan.step)
            T.buffer_store(added, added[place] + _load(plan, row.rows, at), [place])
        result = ins.total(added[place], lanes, dtype)
        result = ins.from_i32(result, 1) if plan.int8 else result
        T.buffer_store(sums, result, [T.Cast("int64", row.index) * count + g])


def _load(plan: Plan, rows: Any, at: Any) -> Any:
    address = T.address_of(rows[at])
    if plan.row_dtype == "int8":
        return ins.load_i8(address, plan.lanes)
    return (ins.load_bf16 if plan.row_dtype == "bfloat16" else ins.load_f32)(address, plan.lanes)
