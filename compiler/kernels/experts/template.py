"""The whole experts layer as one TIR function: sort, pack, gate_up with activation, down with the weighted sum."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.buffers import Pass, Workspace, declare_arguments
from moec.compiler.kernels.experts.dispatch import emit_sort
from moec.compiler.kernels.experts.down import emit_down
from moec.compiler.kernels.experts.gate_up import emit_gate_up
from moec.compiler.kernels.experts.packing import emit_pack, emit_round
from moec.compiler.kernels.experts.plan import MAX_TOKENS_PER_PASS, Plan
from moec.compiler.kernels.experts.tiles import Tiles
from moec.compiler.kernels.template.intrinsics import intrinsics, let, limit_threads

SERIAL_PRODUCTS = 1 << 17  # multiply-adds that one thread does faster than it wakes another


def build_experts(plan: Plan, tiles: Tiles) -> Any:
    """TIR of moec::experts for a plan; parameters as in moec.compiler.kernels.experts.buffers.Arguments."""
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("experts")
        T.func_attr({"tirx.noalias": True})
        args = declare_arguments(plan)
        with intrinsics(plan.level, tiles.text(plan)):
            total = let(T.Cast("int32", args.num_tokens))
            most = let(T.min(total, MAX_TOKENS_PER_PASS))
            ws = Workspace(plan, args.workspace, T.Cast("int64", most))
            with T.serial(T.floordiv(total + (MAX_TOKENS_PER_PASS - 1), MAX_TOKENS_PER_PASS)) as number:
                first = let(number * MAX_TOKENS_PER_PASS)
                tokens = let(T.min(total - first, MAX_TOKENS_PER_PASS))
                now = Pass(plan, tiles, args, ws, first, tokens)
                emit_sort(now)
                slots = tokens * plan.slots_per_token
                small = slots <= SERIAL_PRODUCTS // plan.products_per_slot
                limit_threads(T.Select(small, T.int32(1), T.int32(plan.blocking.threads)))
                emit_pack(now)
                emit_gate_up(now)
                emit_round(now)
                emit_down(now)
                limit_threads(T.int32(0))
    return ib.get()
