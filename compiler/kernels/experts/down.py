"""Last part of the experts kernel: y = sum over a token's experts of weight * (h @ w_down), on all threads.

A task owns output columns and goes through all segments, so sums need no locks and no second pass, and their order (by
expert) does not depend on the threads. Sums are f32 and rounded once. Long inner widths are done a chunk of k at a
time: the weighted sum is linear, so a chunk's product is added like an expert's.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.buffers import Arguments, Workspace
from moec.compiler.kernels.experts.dispatch import COUNTER_DOWN, NUM_SEGMENTS
from moec.compiler.kernels.experts.gate_up import i64
from moec.compiler.kernels.experts.layout import PANEL
from moec.compiler.kernels.experts.plan import Plan
from moec.compiler.kernels.experts.tiles import Step, Tiles
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.flow import fetch_tasks, on_threads

MOST_PANELS, FEW_TOKENS = 8, 32


def emit_down(plan: Plan, tiles: Tiles, args: Arguments, ws: Workspace, first: Any, tokens: Any) -> None:
    """Fills y for tokens [first, first + tokens)."""
    # few tokens: small tasks, so that threads end together; many: wide ones, so that h is read less often
    width = ins.let(T.Select(tokens <= FEW_TOKENS, T.int32(2), T.int32(MOST_PANELS)))
    num_tasks = ins.let(T.floordiv(plan.panels_down + width - 1, width))
    counter = T.address_of(ws.counters[COUNTER_DOWN])

    def worker() -> Any:
        out = T.alloc_buffer((plan.blocking.step_rows * PANEL,), "float32", scope="local", align=64)
        tiles.begin()

        def task(number: Any) -> None:
            start = ins.let(number * width)
            end = ins.let(T.min(start + width, plan.panels_down))
            _emit_clear(ws, start, end, tokens)
            _emit_segments(plan, tiles, args, ws, out, start, end, tokens)
            _emit_result(plan, args, ws, start, end, first, tokens)

        return lambda: fetch_tasks(counter, num_tasks, task)

    on_threads(worker, tiles.end)


def _emit_clear(ws: Workspace, start: Any, end: Any, tokens: Any) -> None:
    with T.serial(i64(end - start) * tokens * (PANEL // 8)) as i:
        T.buffer_store(ws.sums, T.broadcast(T.float32(0), 8), [T.ramp(i64(start) * tokens * PANEL + i * 8, 1, 8)])


def _emit_segments(
    plan: Plan, tiles: Tiles, args: Arguments, ws: Workspace, out: Any, start: Any, end: Any, tokens: Any
) -> None:
    chunk = plan.down_depth_chunk
    num_segments = ins.let(ws.totals[NUM_SEGMENTS])
    num_chunks = -(-plan.depth_down // chunk)
    panel_size = plan.depth_down * PANEL
    with T.serial(num_segments) as g, T.serial(num_chunks) as c:
        expert = ins.let(ws.segment_expert[g])
        rows, row = ins.let(ws.segment_rows[g]), ins.let(ws.segment_row[g])
        k_start = ins.let(c * chunk)
        k_blocks = ins.let(T.floordiv(T.min(plan.depth_down - k_start, chunk), PANEL))
        at = ins.let((i64(expert) * plan.panels_down + i64(start)) * panel_size + i64(k_start) * PANEL)
        last = T.Bind(c + 1 == num_chunks)
        other = ws.segment_expert[T.min(g + 1, num_segments - 1)]
        after_expert = T.Select(last, other, expert)
        after_k = T.Select(last, 0, k_start + chunk)
        after = ins.let((i64(after_expert) * plan.panels_down + i64(start)) * panel_size + i64(after_k) * PANEL)
        with T.serial(T.floordiv(rows + (plan.down_rows - 1), plan.down_rows)) as u:
            low = ins.let(u * plan.down_rows)
            num = ins.let(T.min(rows - low, plan.down_rows))
            _emit_unit(plan, tiles, args, ws, out, _Unit(expert, row, rows, low, num, at, after, k_start, k_blocks, c),
                       start, end, tokens)  # fmt: skip


class _Unit:
    """Rows [low, low + num) of a segment, one chunk of k."""

    def __init__(self, expert, row, rows, low, num, at, after, k_start, k_blocks, chunk) -> None:
        self.expert, self.row, self.rows, self.low, self.num = expert, row, rows, low, num
        self.at, self.after, self.k_start, self.k_blocks, self.chunk = at, after, k_start, k_blocks, chunk


def _emit_unit(
    plan: Plan, tiles: Tiles, args: Arguments, ws: Workspace, out: Any, unit: _Unit, start: Any, end: Any, tokens: Any
) -> None:
    step_rows, panel_size = plan.blocking.step_rows, plan.depth_down * PANEL
    count = ins.let(T.floordiv(unit.num + (step_rows - 1), step_rows))
    with T.serial(end - start) as p:
        w_at = ins.let(unit.at + i64(p) * panel_size)
        upcoming = ins.let(T.Select(start + p + 1 < end, w_at + panel_size, unit.after))
        with T.serial(count) as i:
            low = ins.let(unit.low + i * step_rows)
            num = ins.let(T.min(unit.rows - low, step_rows))
            tiles.step(
                Step(
                    a=ws.h_rows, a_row=unit.row + low, a_depth=plan.depth_down, rows=num, w=args.w_down, w_at=w_at,
                    next_at=upcoming, k_start=i64(unit.k_start), k_blocks=unit.k_blocks, index=i, count=count, out=out,
                )
            )  # fmt: skip
            _emit_combine(plan, args, ws, out, unit, ins.let(start + p), unit.row + low, num, tokens)


def _emit_combine(
    plan: Plan, args: Arguments, ws: Workspace, out: Any, unit: _Unit, panel: Any, row: Any, num: Any, tokens: Any
) -> None:
    lanes = plan.lanes
    with T.serial(num) as r:
        token = ins.let(ws.row_token[row + r])
        weight = T.float32(1.0) if plan.problem.weight_on_input else T.Bind(ws.row_weight[row + r])
        base = ins.let((i64(panel) * tokens + token) * PANEL)
        for part in range(PANEL // lanes):
            value = out[T.ramp(r * PANEL + part * lanes, 1, lanes)]
            if args.b_down is not None:
                bias = args.b_down[unit.expert, T.ramp(panel * PANEL + part * lanes, 1, lanes)]
                value = value + bias * T.broadcast(T.Select(unit.chunk == 0, T.float32(1), T.float32(0)), lanes)
            place = T.ramp(base + part * lanes, 1, lanes)
            T.buffer_store(ws.sums, T.fma(value, T.broadcast(weight, lanes), ws.sums[place]), [place])


def _emit_result(plan: Plan, args: Arguments, ws: Workspace, start: Any, end: Any, first: Any, tokens: Any) -> None:
    """sums -> y, rounded once to its dtype."""
    hidden, lanes = plan.problem.hidden, plan.lanes
    store = ins.store_bf16 if plan.problem.dtype == "bfloat16" else ins.store_f32
    with T.serial(end - start) as p, T.serial(tokens) as t:
        panel = ins.let(start + p)
        base = ins.let((i64(panel) * tokens + t) * PANEL)
        token = i64(first + t)
        with T.If((panel + 1) * PANEL <= hidden):
            with T.Then():
                for part in range(PANEL // lanes):
                    value = ws.sums[T.ramp(base + part * lanes, 1, lanes)]
                    store(T.address_of(args.y[token, panel * PANEL + part * lanes]), value, lanes)
            with T.Else(), T.serial(hidden - panel * PANEL) as c:
                if plan.problem.dtype == "bfloat16":
                    ins.store_bf16(T.address_of(args.y[token, panel * PANEL + c]), ws.sums[base + c])
                else:
                    T.buffer_store(args.y, ws.sums[base + c], [token, panel * PANEL + c])
