"""First part of the experts kernel: sort the slots by expert.

The sort runs on one thread: a counting sort in token order, so a segment's rows are in token order and the result
does not depend on the number of threads. Slots of experts that are not held here (index < 0 or >= E) get no row.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.buffers import Pass, Workspace
from moec.compiler.kernels.experts.parts import blocks_of
from moec.compiler.kernels.experts.plan import COUNTERS, Plan
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.flow import Scalar, when

COUNTER_PACK, COUNTER_DOWN, COUNTER_ROUND, COUNTER_TOKENS, COUNTER_UP = COUNTERS[:5]
COUNTER_WORKERS, COUNTER_FRONT, COUNTER_BACK = COUNTERS[5:]  # of gate_up from both ends: workers, tasks from each
# elements of `totals`; blocks: of rows of x (the shared experts read the same), and of rows of h
NUM_SEGMENTS, NUM_UP_TASKS, NUM_BLOCKS, NUM_ALL_BLOCKS = 0, 1, 2, 3
SPLIT_UP, SPLIT_DOWN = 1, 2  # bits of `block_split`: the block's rows of x, of h are int16


def emit_sort(now: Pass) -> None:
    """Fills segments, blocks, row_token and row_weight."""
    plan, args, ws = now.plan, now.args, now.ws
    for counter in COUNTERS:
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
    blocks = blocks_of(plan, rows)
    with T.serial(blocks.count) as b:
        start, num = blocks.of(b)
        T.buffer_store(ws.block_row, row + start, [block.value])
        T.buffer_store(ws.block_rows, num, [block.value])
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
