"""Last part of the experts kernel: y = sum over a token's experts of weight * (h @ w_down), on all threads.

A task owns output columns and goes through all segments, so sums need no locks and no second pass, and their order (by
expert) does not depend on the threads. Sums are f32 and rounded once. Long inner widths are done a chunk of k at a
time: the weighted sum is linear, so a chunk's product is added like an expert's.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.buffers import Pass
from moec.compiler.kernels.experts.dispatch import COUNTER_DOWN, NUM_SEGMENTS
from moec.compiler.kernels.experts.gate_up import i64
from moec.compiler.kernels.experts.layout import PANEL
from moec.compiler.kernels.experts.parts import Parts, units_of
from moec.compiler.kernels.experts.tiles import Result, Step
from moec.compiler.kernels.experts.waiting import Waiting
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.flow import fetch_tasks, on_threads, when

_LINE = 16  # sums in a cache line
MOST_PANELS = 16  # of a task: weights are read in long stretches, and h seldom
TASKS_PER_THREAD = 2  # at least, where there are so many panels


@dataclasses.dataclass(frozen=True)
class _Columns:
    """The panels [start, end) of a task."""

    start: Any
    end: Any


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Some steps of a segment's rows, k_blocks of k from k_start.

    at: element offset of the weights of the task's first panel; after: of what follows this unit's last panel.
    """

    expert: Any
    row: Any
    rows: Any
    steps: Parts
    at: Any
    after: Any
    k_start: Any
    k_blocks: Any
    chunk: Any


def emit_down(now: Pass) -> None:
    """Fills y."""
    by_threads = T.max(T.floordiv(now.plan.panels_down, ins.num_threads() * TASKS_PER_THREAD), 1)
    usual = T.min(T.int32(MOST_PANELS), by_threads)
    width = ins.let(T.int32(now.plan.blocking.down_panels) if now.plan.blocking.down_panels else usual)
    num_tasks = ins.let(T.floordiv(now.plan.panels_down + width - 1, width))

    def worker() -> Any:
        fields = dict.fromkeys(("expert", "chunk", "row", "panel", "first_sum"), "int32") | {"panel_at": "int64"}
        combine = Waiting(
            now.tiles.between,
            now.plan.blocking.step_rows,
            now.plan.down_depth_chunk,
            fields,
            lambda r, p, of: _emit_combine(now, combine, r, p, of),
        )
        now.tiles.begin()

        def task(number: Any) -> None:
            start = ins.let(number * width)
            columns = _Columns(start, ins.let(T.min(start + width, now.plan.panels_down)))
            _emit_clear(now, columns)
            _emit_segments(now, combine, columns)
            combine.all()
            _emit_result(now, columns)

        return lambda: fetch_tasks(T.address_of(now.ws.counters[COUNTER_DOWN]), num_tasks, task)

    on_threads(worker, now.tiles.end)


def _emit_clear(now: Pass, columns: _Columns) -> None:
    lanes, base = now.plan.lanes, ins.let(i64(columns.start) * now.tokens * PANEL)
    with T.serial(i64(columns.end - columns.start) * now.tokens * (PANEL // lanes)) as i:
        T.buffer_store(now.ws.sums, T.broadcast(T.float32(0), lanes), [T.ramp(base + i * lanes, 1, lanes)])


def _emit_segments(now: Pass, combine: Waiting, columns: _Columns) -> None:
    plan, ws, start = now.plan, now.ws, columns.start
    chunk, panel_size = plan.down_depth_chunk, plan.down.panel_elements
    num_chunks = -(-plan.depth_down // chunk)
    num_segments = ins.let(ws.totals[NUM_SEGMENTS])

    def offset(expert: Any, k: Any) -> Any:
        return ins.let((i64(expert) * plan.panels_down + i64(start)) * panel_size + i64(plan.down.at(k)))

    with T.serial(num_segments) as g, T.serial(num_chunks) as c:
        expert = ins.let(ws.segment_expert[g])
        rows, row = ins.let(ws.segment_rows[g]), ins.let(ws.segment_row[g])
        k_start = ins.let(c * chunk)
        k_blocks = ins.let(T.floordiv(T.min(plan.depth_down - k_start, chunk), PANEL))
        last = T.Bind(c + 1 == num_chunks)
        other = ws.segment_expert[T.min(g + 1, num_segments - 1)]
        after = offset(T.Select(last, other, expert), T.Select(last, 0, k_start + chunk))
        at = offset(expert, k_start)
        units = units_of(plan, rows, plan.down_rows)
        with T.serial(units.count) as u:
            steps = units.steps(u)
            _emit_unit(now, combine, columns, _Unit(expert, row, rows, steps, at, after, k_start, k_blocks, c))


def _emit_unit(now: Pass, combine: Waiting, columns: _Columns, unit: _Unit) -> None:
    plan, start = now.plan, columns.start
    steps, panel_size = unit.steps, plan.down.panel_elements
    together = ins.let(combine.panels_together(steps.rows, steps.count))
    with T.serial(ins.let(T.floordiv(columns.end - start + together - 1, together))) as turn:
        p = ins.let(turn * together)
        panels = ins.let(T.min(columns.end - start - p, together))
        w_at = ins.let(unit.at + i64(p) * panel_size)
        upcoming = ins.let(T.Select(start + p + panels < columns.end, w_at + i64(panels) * panel_size, unit.after))
        with T.serial(steps.count) as i:
            low, num = steps.of(i)
            panel_at = ins.let(w_at - i64(plan.down.at(unit.k_start)))
            first_sum = ins.let(T.Cast("int32", T.floordiv(unit.k_start, plan.sum_depth_down)))
            if not now.tiles.between:
                _emit_ask_for_sums(now, ins.let(start + p), ins.let(unit.row + low), num)
            now.tiles.step(
                Step(
                    a=now.ws.h_rows,
                    a_row=unit.row + low,
                    a_depth=plan.depth_down,
                    rows=num,
                    panels=panels,
                    w=now.args.w_down,
                    w_at=w_at,
                    next_at=upcoming,
                    k_start=i64(unit.k_start),
                    k_blocks=unit.k_blocks,
                    index=i,
                    count=steps.count,
                    out=combine.out,
                    out_at=ins.let(combine.next_at),
                    panel_at=panel_at,
                    side=plan.down,
                    sums=now.ws.h_sums if plan.down.has_sums else None,
                    num_sums=plan.sums_down,
                    first_sum=first_sum,
                    split=plan.down.is_split(unit.rows),
                    waiting=combine,
                )
            )
            combine.put(
                num,
                panels,
                expert=unit.expert,
                chunk=unit.chunk,
                row=unit.row + low,
                panel=start + p,
                first_sum=first_sum,
                panel_at=panel_at,
            )


def _emit_ask_for_sums(now: Pass, panel: Any, row: Any, num: Any) -> None:
    """Asks for the sums that a step's rows are added to while it multiplies.

    Those of many tokens are more than the second-level cache holds. Where rows are added between the products of the
    next step (tiles.between), the wait is hidden anyway.
    """
    with T.serial(num) as i:
        place = ins.let((i64(panel) * now.tokens + now.ws.row_token[row + i]) * PANEL)
        for part in range(0, PANEL, _LINE):
            ins.prefetch(T.address_of(now.ws.sums[place + part]))


def _emit_combine(now: Pass, combine: Waiting, r: Any, p: Any, of: SimpleNamespace) -> None:
    """Row r of a step's p-th panel: the sums of its token += weight * (C + bias)."""
    plan, ws, lanes = now.plan, now.ws, now.plan.lanes
    panel = ins.let(of.panel + p)
    result = Result(
        out=combine.out,
        out_at=of.out_at,
        w=now.args.w_down,
        panel_at=ins.let(of.panel_at + i64(p) * plan.down.panel_elements),
        side=plan.down,
        a_row=of.row,
        sums=ws.h_sums if plan.down.has_sums else None,
        num_sums=plan.sums_down,
        first_sum=of.first_sum,
    )
    token = ins.let(ws.row_token[of.row + r])
    weight = T.float32(1.0) if plan.problem.weight_on_input else T.Bind(ws.row_weight[of.row + r])
    scale = T.Bind(ws.h_scale[of.row + r]) if plan.down.planes else None
    base = ins.let((i64(panel) * now.tokens + token) * PANEL)
    for part in range(0, PANEL, lanes):
        value = now.tiles.value(result, r, part, lanes)
        if scale is not None:
            value = value * T.broadcast(scale, lanes)
        if now.args.b_down is not None:
            bias = now.args.b_down[of.expert, T.ramp(panel * PANEL + part, 1, lanes)]
            value = value + bias * T.broadcast(T.Select(of.chunk == 0, T.float32(1), T.float32(0)), lanes)
        place = T.ramp(base + part, 1, lanes)
        T.buffer_store(ws.sums, T.fma(value, T.broadcast(weight, lanes), ws.sums[place]), [place])


def _emit_result(now: Pass, columns: _Columns) -> None:
    """sums -> y, rounded once to its dtype."""
    y, sums, hidden, lanes = now.args.y, now.ws.sums, now.plan.problem.hidden, now.plan.lanes
    narrow = now.plan.problem.dtype == "bfloat16"
    store = ins.store_bf16 if narrow else ins.store_f32
    with T.serial(columns.end - columns.start) as p, T.serial(now.tokens) as t:
        panel = ins.let(columns.start + p)
        base = ins.let((i64(panel) * now.tokens + t) * PANEL)
        token = i64(now.first + t)

        def whole(panel: Any = panel, base: Any = base, token: Any = token) -> None:
            for part in range(0, PANEL, lanes):
                store(T.address_of(y[token, panel * PANEL + part]), sums[T.ramp(base + part, 1, lanes)], lanes)

        def tail(panel: Any = panel, base: Any = base, token: Any = token) -> None:
            with T.serial(hidden - panel * PANEL) as c:
                if narrow:
                    ins.store_bf16(T.address_of(y[token, panel * PANEL + c]), sums[base + c])
                else:
                    T.buffer_store(y, sums[base + c], [token, panel * PANEL + c])

        when((panel + 1) * PANEL <= hidden, whole, tail)
