"""Second part of the experts kernel: x, and later h, as the packed rows that tiles multiply.

A token's row is rounded once and copied to the rows of all its experts; where rows differ by expert (weights on the
input, int16 for experts with few rows) each is made on its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.buffers import Pass
from moec.compiler.kernels.experts.dispatch import (
    COUNTER_PACK,
    COUNTER_ROUND,
    COUNTER_TOKENS,
    NUM_ALL_BLOCKS,
    NUM_BLOCKS,
    SPLIT_DOWN,
    SPLIT_UP,
)
from moec.compiler.kernels.experts.layout import PANEL, padded
from moec.compiler.kernels.experts.plan import Plan
from moec.compiler.kernels.experts.rounding import PackedRow, emit_rounded_row, emit_split_row, emit_sums, wide_at
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.flow import fetch_tasks, on_threads, when

SERIAL_ROWS = 64  # up to so many rows are packed faster than other threads wake up


def emit_pack(now: Pass) -> None:
    """Fills x_rows: every block as [k step][row][step], zeros beyond H; integer rows with their scales and sums."""
    if now.plan.rounds_tokens:
        _emit_rounded_tokens(now)
    if now.plan.rounds_tokens or now.plan.copies_tokens:
        _emit_copied_rows(now)
    else:
        _emit_converted_rows(now)


def _emit_rounded_tokens(now: Pass) -> None:
    """x -> token_rows as int8, with scales and sums."""
    plan, ws = now.plan, now.ws

    def token(number: Any) -> None:
        at, base = ins.let(T.Cast("int64", now.first + number)), ins.let(T.Cast("int64", number) * plan.depth_up)
        alone = PackedRow(ws.token_rows, number, base, T.int64(plan.step), T.int32(0), T.int32(1))
        source = lambda k, lanes: _load(plan.problem.dtype, now.args.x[at, k], lanes)  # noqa: E731
        emit_rounded_row(plan, plan.up, source, plan.problem.hidden, alone, ws.token_scale)
        if plan.up.has_sums:
            emit_sums(plan, plan.up, alone, plan.depth_up // plan.sums_up, ws.token_sums)

    _emit_shared_out(now, COUNTER_TOKENS, now.tokens, token)


def _emit_copied_rows(now: Pass) -> None:
    """Rows of x, or of token_rows, -> x_rows, a k step of a block after another: each is written from end to end."""
    plan, ws = now.plan, now.ws
    words = 4 * plan.lanes // plan.row_bytes

    def source(token: Any, k: Any) -> Any:
        return ws.token_rows[token * plan.depth_up + k] if plan.rounds_tokens else now.args.x[now.first + token, k]

    def task(block: Any) -> None:
        rows, start = ins.let(ws.block_rows[block]), ins.let(ws.block_row[block])
        base = ins.let(T.Cast("int64", start) * plan.depth_up)
        with T.serial(plan.depth_up // plan.step) as step, T.serial(rows) as i:
            token, k = ins.let(T.Cast("int64", ws.row_token[start + i])), T.Cast("int64", step) * plan.step
            target = ins.let(base + k * T.Cast("int64", rows) + T.Cast("int64", i) * plan.step)
            for part in range(0, plan.step, words):
                value = ins.load_i32(T.address_of(source(token, k + part)), plan.lanes)
                ins.store_i32(T.address_of(ws.x_rows[target + part]), value, plan.lanes)
        if plan.up.planes:
            with T.serial(rows) as i:
                row, token = ins.let(start + i), ins.let(ws.row_token[start + i])
                T.buffer_store(ws.x_scale, ws.token_scale[token], [row])
                with T.serial(plan.sums_up if plan.up.has_sums else 0) as g:
                    T.buffer_store(ws.x_sums, ws.token_sums[token * plan.sums_up + g], [row * plan.sums_up + g])

    _emit_shared_out(now, COUNTER_PACK, ins.let(ws.totals[NUM_BLOCKS]), task)


def _emit_shared_out(now: Pass, counter: int, count: Any, task: Any) -> None:
    """task(number) for each number below count, on all threads where that is faster."""

    def serial() -> None:
        with T.serial(count) as number:
            task(number)

    def parallel() -> None:
        on_threads(lambda: lambda: fetch_tasks(T.address_of(now.ws.counters[counter]), count, task))

    when(now.tokens * now.plan.slots_per_token <= SERIAL_ROWS, serial, parallel)


def _emit_converted_rows(now: Pass) -> None:
    """x -> x_rows, each row on its own."""
    plan, ws, hidden, planes = now.plan, now.ws, now.plan.problem.hidden, now.plan.up.planes

    def emit(packed: PackedRow, split: Any) -> None:
        token = ins.let(T.Cast("int64", now.first + ws.row_token[packed.index]))
        weight = T.Bind(ws.row_weight[packed.index]) if plan.problem.weight_on_input else None

        def source(k: Any, lanes: int) -> Any:
            value = _load(plan.problem.dtype, now.args.x[token, k], lanes)
            return value if weight is None else value * (weight if lanes == 1 else T.broadcast(weight, lanes))

        def numbers() -> None:
            _emit_pack_row(plan, now.args.x, token, weight, packed)
            if planes:
                T.buffer_store(ws.x_scale, T.float32(1), [packed.index])

            if plan.up.has_sums and not planes:
                sums()

        def integers() -> None:
            emit_row = emit_split_row if planes == 2 else emit_rounded_row
            emit_row(plan, plan.up, source, hidden, packed, ws.x_scale)
            sums()

        def sums() -> None:
            emit_sums(plan, plan.up, packed, plan.depth_up // plan.sums_up, ws.x_sums)

        _emit_by_planes(planes, split, numbers, integers)

    _emit_for_blocks(now, _Rows(COUNTER_PACK, NUM_BLOCKS, ws.x_rows, plan.depth_up, SPLIT_UP), emit)


def emit_round(now: Pass) -> None:
    """h_wide -> h_rows as integers, with scales; sums of the rows of h where the tiles want them; zeros beyond F."""
    plan, ws, width, planes = now.plan, now.ws, now.plan.width_down, now.plan.down.planes
    if not plan.down.has_sums and width == plan.depth_down:
        return

    def emit(packed: PackedRow, split: Any) -> None:
        row = (ins.let(packed.index - packed.place), packed.place)

        def source(k: Any, lanes: int) -> Any:
            at = wide_at(padded(plan.problem.inner), row, packed.block_rows, k)
            return ins.load_bf16(T.address_of(ws.h_wide[at]), lanes)

        def numbers() -> None:
            with T.serial(plan.depth_down - width) as k:
                _store(plan.row_dtype, packed.rows[packed.at(k + width, plan.step)], T.float32(0), 1)
            if planes:
                T.buffer_store(ws.h_scale, T.float32(1), [packed.index])
            elif plan.down.has_sums:
                sums()

        def integers() -> None:
            emit_row = emit_split_row if planes == 2 else emit_rounded_row
            emit_row(plan, plan.down, source, width, packed, ws.h_scale)
            sums()

        def sums() -> None:
            emit_sums(plan, plan.down, packed, plan.sum_depth_down, ws.h_sums)

        _emit_by_planes(planes, split, numbers, integers)

    _emit_for_blocks(now, _Rows(COUNTER_ROUND, NUM_ALL_BLOCKS, ws.h_rows, plan.depth_down, SPLIT_DOWN), emit)


def _emit_by_planes(planes: int, split: Any, numbers: Any, integers: Any) -> None:
    """Rows in two planes are integers where their block is split."""
    if planes == 2:
        when(split, integers, numbers)
    elif planes:
        integers()
    else:
        numbers()


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Packed rows to fill: a counter of tasks, which total has the number of blocks, elements of a row, a split bit."""

    counter: int
    total: int
    rows: Any
    depth: int
    split: int


def _emit_for_blocks(now: Pass, all_of: _Rows, emit: Any) -> None:
    """emit(packed row, whether its block is split) on all threads."""
    plan, ws = now.plan, now.ws
    num_blocks = ins.let(ws.totals[all_of.total])

    def task(block: Any) -> None:
        rows, start = ins.let(ws.block_rows[block]), ins.let(ws.block_row[block])
        base = ins.let(T.Cast("int64", start) * all_of.depth)
        stride = ins.let(T.Cast("int64", rows) * plan.step)
        split = T.Bind(T.bitwise_and(ins.let(ws.block_split[block]), all_of.split) > 0) if plan.splits else None
        with T.serial(rows) as i:
            emit(PackedRow(all_of.rows, ins.let(start + i), ins.let(base + i * plan.step), stride, i, rows), split)

    _emit_shared_out(now, all_of.counter, num_blocks, task)


def _emit_pack_row(plan: Plan, x: Any, token: Any, weight: Any, packed: PackedRow) -> None:
    hidden, lanes = plan.problem.hidden, plan.lanes

    def target(k: int | Any, c: int) -> Any:
        return packed.rows[packed.base + k * packed.stride + c]

    with T.serial(hidden // PANEL) as kt:
        for part in range(PANEL // lanes):
            _emit_convert(plan, x[token, kt * PANEL + part * lanes], target(kt, part * lanes), weight, lanes)
    for k in range(hidden // PANEL * PANEL, plan.depth_up):
        place = target(k // PANEL, k % PANEL)
        if k < hidden:
            _emit_convert(plan, x[token, k], place, weight, 1)
        else:
            _store(plan.row_dtype, place, T.float32(0), 1)


def _emit_convert(plan: Plan, source: Any, target: Any, weight: Any, lanes: int) -> None:
    value = _load(plan.problem.dtype, source, lanes)
    if weight is not None:
        value = value * (weight if lanes == 1 else T.broadcast(weight, lanes))
    _store(plan.row_dtype, target, value, lanes)


def _load(dtype: str, source: Any, lanes: int) -> Any:
    address = T.address_of(source)
    if dtype == "bfloat16":
        return ins.load_bf16(address, lanes)
    return source if lanes == 1 else ins.load_f32(address, lanes)


def _store(dtype: str, target: Any, value: Any, lanes: int) -> None:
    if dtype == "bfloat16":
        ins.store_bf16(T.address_of(target), value, lanes)
    elif lanes == 1:
        T.buffer_store(target.source, value, list(target.indices))
    else:
        ins.store_f32(T.address_of(target), value, lanes)
