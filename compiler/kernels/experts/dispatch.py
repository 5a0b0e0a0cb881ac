"""First part of the experts kernel: sort the slots by expert, then gather and convert x into packed rows.

The sort runs on one thread: a counting sort in token order, so a segment's rows are in token order and the result
does not depend on the number of threads. Slots of experts that are not held here (index < 0 or >= E) get no row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.buffers import Pass, Workspace
from moec.compiler.kernels.experts.layout import PANEL, padded
from moec.compiler.kernels.experts.plan import Plan
from moec.compiler.kernels.experts.rounding import PackedRow, emit_rounded_row, emit_split_row, emit_sums, wide_at
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.flow import Scalar, fetch_tasks, on_threads, when

COUNTER_PACK, COUNTER_UP, COUNTER_DOWN, COUNTER_ROUND = 0, 16, 32, 48  # elements of `counters`, a cache line apart
# elements of `totals`; blocks: of rows of x (the shared experts read the same), and of rows of h
NUM_SEGMENTS, NUM_UP_TASKS, NUM_BLOCKS, NUM_ALL_BLOCKS = 0, 1, 2, 3
SPLIT_UP, SPLIT_DOWN = 1, 2  # bits of `block_split`: the block's rows of x, of h are int16
SERIAL_ROWS = 64  # up to so many rows are packed faster than other threads wake up


def emit_sort(now: Pass) -> None:
    """Fills segments, blocks, row_token and row_weight."""
    plan, args, ws = now.plan, now.args, now.ws
    for counter in (COUNTER_PACK, COUNTER_UP, COUNTER_DOWN, COUNTER_ROUND):
        T.buffer_store(ws.counters, 0, [counter])
    with T.serial(plan.problem.num_experts) as e:
        T.buffer_store(ws.cursor, 0, [e])
    _for_each_slot(now, lambda t, k, e: T.buffer_store(ws.cursor, ws.cursor[e] + 1, [e]))
    _emit_segments(plan, ws, now.tokens)

    def place(t: Any, k: Any, e: Any) -> None:
        row = ins.let(ws.cursor[e])
        T.buffer_store(ws.cursor, row + 1, [e])
        T.buffer_store(ws.row_token, t, [row])
        T.buffer_store(ws.row_weight, args.weights[now.first + t, k], [row])

    _for_each_slot(now, place)
    _emit_shared_rows(now)


def _for_each_slot(now: Pass, emit: Any) -> None:
    problem = now.plan.problem
    with T.serial(now.tokens) as t, T.serial(problem.top_k) as k:
        expert = ins.let(now.args.experts[now.first + t, k])
        held = tirx.all(expert >= 0, expert < problem.num_experts)
        when(held, lambda: emit(t, k, expert))


def _emit_segments(plan: Plan, ws: Workspace, tokens: Any) -> None:
    """Turns counts into segments; cursor[e] becomes the first row of expert e."""
    T.buffer_store(ws.totals, 0, [NUM_BLOCKS])
    segment, row = Scalar("int32", 0), Scalar("int32", 0)
    task, block = Scalar("int32", 0), Scalar("int32", 0)

    def add(expert: Any, rows: Any, x_row: Any, packs: bool) -> None:
        for buffer, value in (
            (ws.segment_expert, expert),
            (ws.segment_row, row.value),
            (ws.segment_rows, rows),
            (ws.segment_x_row, x_row),
            (ws.segment_task, task.value),
        ):
            T.buffer_store(buffer, value, [segment.value])
        task.set(task.value + T.floordiv(rows + (plan.unit_rows - 1), plan.unit_rows) * plan.up_groups)
        _emit_blocks(plan, ws, block, row.value, rows)
        if packs:
            T.buffer_store(ws.totals, block.value, [NUM_BLOCKS])
        segment.set(segment.value + 1)

    with T.serial(plan.problem.num_experts) as e:
        rows = ins.let(ws.cursor[e])
        T.buffer_store(ws.cursor, row.value, [e])
        when(rows > 0, lambda: add(e, rows, row.value, True))
        row.set(row.value + rows)
    x_row = ins.let(row.value)
    for j in range(plan.problem.num_shared):
        add(plan.problem.num_experts + j, tokens, x_row, j == 0)
        row.set(row.value + tokens)
    T.buffer_store(ws.segment_task, task.value, [segment.value])
    for index, total in ((NUM_SEGMENTS, segment), (NUM_UP_TASKS, task), (NUM_ALL_BLOCKS, block)):
        T.buffer_store(ws.totals, total.value, [index])


def _emit_blocks(plan: Plan, ws: Workspace, block: Scalar, row: Any, rows: Any) -> None:
    size = plan.blocking.block_rows
    with T.serial(T.floordiv(rows + (size - 1), size)) as b:
        T.buffer_store(ws.block_row, row + b * size, [block.value])
        T.buffer_store(ws.block_rows, T.min(rows - b * size, size), [block.value])
        if plan.splits:
            up, down = (T.Cast("int32", side.is_split(rows)) for side in (plan.up, plan.down))
            T.buffer_store(ws.block_split, SPLIT_UP * up + SPLIT_DOWN * down, [block.value])
        block.set(block.value + 1)


def _emit_shared_rows(now: Pass) -> None:
    """row_token and row_weight of the shared experts' rows."""
    ws, shared, shared_weight = now.ws, now.plan.problem.num_shared, now.args.shared_weight
    with T.serial(shared) as j:
        start = ins.let(ws.segment_row[ws.totals[NUM_SEGMENTS] - shared + j])
        with T.serial(now.tokens) as t:
            weight = T.float32(1.0) if shared_weight is None else shared_weight[now.first + t]
            T.buffer_store(ws.row_token, t, [start + t])
            T.buffer_store(ws.row_weight, weight, [start + t])


def emit_pack(now: Pass) -> None:
    """Fills x_rows: every block as [k step][row][step], zeros beyond H; integer rows with their scales and sums."""
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
            emit_sums(plan, packed, plan.depth_up, plan.depth_up // plan.sums_up, ws.x_sums, planes)

        _emit_by_planes(planes, split, numbers, integers)

    _emit_for_blocks(now, _Rows(COUNTER_PACK, NUM_BLOCKS, ws.x_rows, plan.depth_up, SPLIT_UP), emit)


def emit_round(now: Pass) -> None:
    """h_wide -> h_rows as integers, with scales; sums of the rows of h where the tiles want them; zeros beyond F."""
    plan, ws, inner, planes = now.plan, now.ws, padded(now.plan.problem.inner), now.plan.down.planes
    if not plan.down.has_sums and inner == plan.depth_down:
        return

    def emit(packed: PackedRow, split: Any) -> None:
        row = (ins.let(packed.index - packed.place), packed.place)

        def source(k: Any, lanes: int) -> Any:
            return ins.load_bf16(T.address_of(ws.h_wide[wide_at(inner, row, packed.block_rows, k)]), lanes)

        def numbers() -> None:
            with T.serial(plan.depth_down - inner) as k:
                _store(plan.row_dtype, packed.rows[packed.at(k + inner, plan.step)], T.float32(0), 1)
            if planes:
                T.buffer_store(ws.h_scale, T.float32(1), [packed.index])
            elif plan.down.has_sums:
                sums()

        def integers() -> None:
            emit_row = emit_split_row if planes == 2 else emit_rounded_row
            emit_row(plan, plan.down, source, inner, packed, ws.h_scale)
            sums()

        def sums() -> None:
            emit_sums(plan, packed, plan.depth_down, plan.sum_depth_down, ws.h_sums, planes)

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

    def serial() -> None:
        with T.serial(num_blocks) as block:
            task(block)

    def parallel() -> None:
        on_threads(lambda: lambda: fetch_tasks(T.address_of(ws.counters[all_of.counter]), num_blocks, task))

    when(now.tokens * plan.slots_per_token <= SERIAL_ROWS, serial, parallel)


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
