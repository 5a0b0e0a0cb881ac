"""Third part of the experts kernel: h = act(x @ w_gate, x @ w_up), row by row of the segments, on all threads.

A task is a group of panels (about a megabyte of weights) for as many rows of one segment as stay in the cache. Tasks
of one group with different rows follow each other, so the group's weights come from memory once. The shared experts,
which have all tokens, are last: from some tokens on every second thread begins there, so that some multiply while
others read, and no thread waits at the end for one that has just begun a long task.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.buffers import Pass, Workspace
from moec.compiler.kernels.experts.dispatch import (
    COUNTER_BACK,
    COUNTER_FRONT,
    COUNTER_UP,
    COUNTER_WORKERS,
    NUM_SEGMENTS,
    NUM_UP_TASKS,
)
from moec.compiler.kernels.experts.layout import HALF, PANEL, padded
from moec.compiler.kernels.experts.parts import units_of
from moec.compiler.kernels.experts.plan import Plan
from moec.compiler.kernels.experts.rounding import wide_at
from moec.compiler.kernels.experts.tiles import Result, Step
from moec.compiler.kernels.experts.waiting import Waiting
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.activation import activate
from moec.compiler.kernels.template.flow import Scalar, on_threads, when

_BUSY_ROWS = 10  # of bf16 products that take as long as reading a byte of weights, on vector registers (docs/cpu.md)


def i64(value: Any) -> Any:
    """As a 64-bit integer, for element offsets."""
    return T.Cast("int64", value)


def emit_gate_up(now: Pass) -> None:
    """Fills h_rows."""

    def worker() -> Any:
        fields = dict.fromkeys(("expert", "row", "rows", "x_row", "panel", "start"), "int32") | {"panel_at": "int64"}
        if now.plan.blocking.even_blocks:
            fields["num"] = "int32"
        activation = Waiting(
            now.tiles.between,
            now.plan.blocking.step_rows,
            now.plan.depth_up,
            fields,
            lambda r, p, of: _emit_activation(now, activation, r, p, of),
        )
        now.tiles.begin()
        return lambda: _emit_tasks(now, activation)

    on_threads(worker, now.tiles.end)


def _take(ws: Workspace, counter: int) -> Any:
    return ins.fetch_add(T.address_of(ws.counters[counter]), 1)


def _busy_rows(plan: Plan) -> int:
    """Rows of an expert from which its products, rather than the reading of its weights, take a thread's time."""
    side = plan.up
    weight_bytes = side.panel_bytes / (side.depth * PANEL)
    return math.ceil(_BUSY_ROWS * weight_bytes * (2 if side.planes == 1 else 1))


class _Cursor:
    """A task number with its segment and the offset of its first panel; moves to later ones only.

    backwards: whether this worker takes tasks from the end, while others take them from the front; None: none does.
    """

    def __init__(self, plan: Plan, ws: Workspace, backwards: Any) -> None:
        self._plan, self._ws, self._backwards = plan, ws, backwards
        first = 0 if backwards is None else T.Select(backwards, ins.let(ws.totals[NUM_SEGMENTS]) - 1, 0)
        self.task, self.segment, self.at = Scalar("int32", 0), Scalar("int32", first), Scalar("int64", T.int64(0))

    def fetch(self, num_tasks: Any) -> None:
        """Takes the next task number and finds its segment; past the end `at` keeps its value."""
        plan, ws = self._plan, self._ws
        self.task.set(_take(ws, COUNTER_UP))
        with T.If(self.task.value < num_tasks), T.Then():
            if self._backwards is None:
                self._forwards()
            else:
                when(self._backwards, lambda: self._from_end(num_tasks), self._from_front)
            expert = i64(ws.segment_expert[self.segment.value])
            panel = expert * plan.panels_up + i64(self.group() * plan.up_panels_per_task)
            self.at.set(panel * plan.up.panel_elements)

    def _from_front(self) -> None:
        self.task.set(_take(self._ws, COUNTER_FRONT))
        self._forwards()

    def _forwards(self) -> None:
        with T.While(self.task.value >= self._ws.segment_task[self.segment.value + 1]):
            self.segment.set(self.segment.value + 1)

    def _from_end(self, num_tasks: Any) -> None:
        self.task.set(num_tasks - 1 - _take(self._ws, COUNTER_BACK))
        with T.While(self.task.value < self._ws.segment_task[self.segment.value]):
            self.segment.set(self.segment.value - 1)

    def units(self) -> Any:
        """Units of rows of the segment."""
        rows = self._ws.segment_rows[self.segment.value]
        return T.floordiv(rows + (self._plan.unit_rows - 1), self._plan.unit_rows)

    def group(self) -> Any:
        """Group of panels of the task."""
        return T.floordiv(self.task.value - self._ws.segment_task[self.segment.value], self.units())

    def unit(self) -> Any:
        """Unit of rows of the task."""
        return T.floormod(self.task.value - self._ws.segment_task[self.segment.value], self.units())

    def copy(self, other: _Cursor) -> None:
        """Becomes the other."""
        for mine, theirs in ((self.task, other.task), (self.segment, other.segment), (self.at, other.at)):
            mine.set(theirs.value)


def _emit_tasks(now: Pass, activation: Waiting) -> None:
    num_tasks = ins.let(now.ws.totals[NUM_UP_TASKS])
    backwards = None
    if now.plan.problem.num_shared and now.plan.level != "amx_bf16":
        busy = now.tokens >= _busy_rows(now.plan)
        number = ins.let(_take(now.ws, COUNTER_WORKERS))
        backwards = T.Bind(tirx.all(T.floormod(number, 2) == 1, busy))
    # the task after this one is taken early: its first panel is what the last panel's steps prefetch
    current, following = _Cursor(now.plan, now.ws, backwards), _Cursor(now.plan, now.ws, backwards)
    following.fetch(num_tasks)
    current.copy(following)
    with T.While(current.task.value < num_tasks):
        following.fetch(num_tasks)
        _emit_task(now, activation, current, following.at.value)
        current.copy(following)
    activation.all()


@dataclasses.dataclass(frozen=True)
class _Segment:
    """The segment of a task: its expert, rows, first row in h and in x_rows."""

    expert: Any
    rows: Any
    row: Any
    x_row: Any


def _emit_task(now: Pass, activation: Waiting, current: _Cursor, next_at: Any) -> None:
    plan, ws = now.plan, now.ws
    panel_size = plan.up.panel_elements
    g = ins.let(current.segment.value)
    fields = (ws.segment_expert, ws.segment_rows, ws.segment_row, ws.segment_x_row)
    segment = _Segment(*(ins.let(field[g]) for field in fields))
    steps = units_of(plan, segment.rows, plan.unit_rows).steps(current.unit())
    panel_start = ins.let(current.group() * plan.up_panels_per_task)
    num_panels = ins.let(T.min(plan.panels_up - panel_start, plan.up_panels_per_task))
    at, after = ins.let(current.at.value), ins.let(next_at)
    together = ins.let(activation.panels_together(steps.rows, steps.count))
    with T.serial(ins.let(T.floordiv(num_panels + together - 1, together))) as turn:
        p = ins.let(turn * together)
        panels = ins.let(T.min(num_panels - p, together))
        w_at = ins.let(at + i64(p) * panel_size)
        upcoming = ins.let(T.Select(p + panels < num_panels, w_at + i64(panels) * panel_size, after))
        with T.serial(steps.count) as i:
            start, num = steps.of(i)
            now.tiles.step(
                Step(
                    a=ws.x_rows,
                    a_row=segment.x_row + start,
                    a_depth=plan.depth_up,
                    rows=num,
                    panels=panels,
                    w=now.args.w_gate_up,
                    w_at=w_at + plan.up.at(0),
                    next_at=upcoming + plan.up.at(0),
                    k_start=T.int64(0),
                    k_blocks=plan.depth_up // PANEL,
                    index=i,
                    count=steps.count,
                    out=activation.out,
                    out_at=ins.let(activation.next_at),
                    panel_at=w_at,
                    side=plan.up,
                    sums=ws.x_sums if plan.up.has_sums else None,
                    num_sums=plan.sums_up,
                    first_sum=0,
                    split=plan.up.is_split(segment.rows),
                    waiting=activation,
                )
            )
            activation.put(
                num,
                panels,
                expert=segment.expert,
                row=segment.row,
                rows=segment.rows,
                x_row=segment.x_row,
                panel=panel_start + p,
                start=start,
                panel_at=w_at,
                **({"num": num} if plan.blocking.even_blocks else {}),
            )


def _emit_activation(now: Pass, activation: Waiting, r: Any, p: Any, of: SimpleNamespace) -> None:
    """Row r of a step's p-th panel: C -> h, in the packed form that the down GEMM reads, or wide."""
    plan, ws = now.plan, now.ws
    panel = ins.let(of.panel + p)
    lanes, columns = plan.lanes, plan.columns_per_panel
    per_block = PANEL // columns
    store = ins.store_f32 if plan.row_dtype == "float32" else ins.store_bf16
    result = Result(
        out=activation.out,
        out_at=of.out_at,
        w=now.args.w_gate_up,
        panel_at=ins.let(of.panel_at + i64(p) * plan.up.panel_elements),
        side=plan.up,
        a_row=of.x_row + of.start,
        sums=ws.x_sums if plan.up.has_sums else None,
        num_sums=plan.sums_up,
        first_sum=0,
    )
    i = ins.let(of.start + r)
    if plan.blocking.even_blocks:  # a step is a block
        start, place, block_rows = of.start, r, ins.let(i64(of.num))
    else:
        size = plan.blocking.block_rows
        start, place = ins.let(T.floordiv(i, size)) * size, T.floormod(i, size)
        block_rows = ins.let(i64(T.min(of.rows - start, size)))
    row = (ins.let(of.row + start), ins.let(place))
    base = i64(of.row + start) * plan.depth_down + i64(place) * PANEL
    base = base + i64(T.floordiv(panel, per_block)) * (block_rows * PANEL)
    base = ins.let(base + i64(T.floormod(panel, per_block)) * columns)
    scale = T.Bind(ws.x_scale[of.x_row + i]) if plan.up.planes else None

    def column(first: int) -> Any:
        """A vector of columns of the row, with the row's scale and the bias."""
        value = now.tiles.value(result, r, first, lanes)
        if scale is not None:
            value = value * T.broadcast(scale, lanes)
        if now.args.b_gate_up is None:
            return value
        return value + now.args.b_gate_up[of.expert, T.ramp(panel * PANEL + first, 1, lanes)]

    for part in range(0, columns, lanes):
        gate, up = (column(part), column(part + HALF)) if plan.activation.gated else (None, column(part))
        h = T.Bind(activate(plan.activation, gate, up, lanes))

        def to_wide(part: int = part, h: Any = h) -> None:
            at = wide_at(padded(plan.problem.inner), row, block_rows, panel * columns + part)
            ins.store_bf16(T.address_of(ws.h_wide[at]), h, lanes)

        def to_rows(at: Any = base + part, h: Any = h) -> None:
            store(T.address_of(ws.h_rows[at]), h, lanes)

        if plan.down.planes == 2:
            when(plan.down.is_split(of.rows), to_wide, to_rows)
        else:
            (to_wide if plan.down.planes else to_rows)()
