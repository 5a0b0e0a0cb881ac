"""What the grouped GEMMs read and how they write: the arguments, and the way of a sum from registers to memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.cuda.activation import activate
from moec.compiler.kernels.cuda.emit import Expr, pack_bf16, ptx, size, store_words, tensor
from moec.compiler.kernels.cuda.gemm_problem import UNIT_DEPTH, UNIT_ROWS, GemmProblem
from moec.compiler.kernels.cuda.rows import slot_weight
from moec.passes.ir.activation import Activation


class Operands:
    """The arguments of a GEMM, and the emitter of its results.

    splits: of K over blocks.  gather: rows of x are tokens, found by slot; else they lie in slot_order.
    """

    def __init__(self, problem: GemmProblem, splits: int, gather: bool) -> None:
        p, self.problem, self.splits, self.gather = problem, problem, splits, gather
        x_rows, self.slots, self.tiles = size("x_rows"), size("slots"), size("tiles")
        self.x = tensor("x", (x_rows, p.depth), p.dtype)
        self.w, self.w_scale = weights(p)
        self.x_rows = x_rows
        self.x_scale = tensor("x_scale", (x_rows,), "float32") if p.dtype == "float8_e4m3fn" else None
        self.bias = tensor("bias", (p.num_experts, p.weight_rows), "float32") if p.has_bias else None
        self.slot_order = tensor("slot_order", (self.slots,), "int32")
        self.expert_start = tensor("expert_start", (p.num_experts + 1,), "int32")
        self.tile_expert = tensor("tile_expert", (self.tiles,), "int32")
        self.tile_row = tensor("tile_row", (self.tiles,), "int32")
        self.route_weights = self.shared_weight = None
        rows = self.slots * splits
        if p.reduce:
            rows = n = size("n")
            self.route_weights = tensor("weights", (n, p.slots_per_token - p.num_shared), "float32")
            self.shared_weight = tensor("shared_weight", (n,), "float32") if p.has_shared_weight else None
        self.y = tensor("y", (rows, p.columns), p.result_dtype)

    def source_row(self, row: Expr) -> Expr:
        """The row of x that a row of the result is made from."""
        return self.slot_order[row] // self.problem.slots_per_token if self.gather else row

    def begin_row(self, row: Expr, expert: Expr, split: Expr) -> None:
        """Reads what the results of a row need: its scale, its weight, and where they go."""
        p, self.expert, self.split = self.problem, expert, split
        if self.x_scale is not None:
            self.row_scale = T.Bind(self.x_scale[self.source_row(row)])
        if p.mode == "gate_up":
            self.to_row = row
        elif p.reduce:
            slot = T.Bind(self.slot_order[row])
            self.to_row = T.Bind(slot // p.slots_per_token)
            k = slot % p.slots_per_token
            self.row_weight = slot_weight(p, self.route_weights, self.shared_weight, self.to_row, k)
        else:
            place = row if p.mode == "gate_up_part" else self.slot_order[row]
            self.to_row = T.Bind(T.Cast("int64", place) + T.Cast("int64", split) * self.slots)

    def store(self, column: Expr, sums: Sequence[Sequence[Expr]]) -> None:
        """Two neighbouring results from column on: sums[half][0 or 1] are the f32 sums, half 1 those of `up`."""
        p, pair = self.problem, []
        for j in range(2):
            value = self._value(sums[0][j], column + j)
            if p.mode == "gate_up":
                up = self._value(sums[1][j], p.columns + column + j) if len(sums) == 2 else None
                value = activate(Activation.parse(p.act), value, up)
            pair.append(value)
        if p.reduce:
            for j, value in enumerate(pair):
                ptx("red.global.add.f32", self.y.ptr_to([self.to_row, column + j]), self.row_weight * value)
            return
        pointer = self.y.ptr_to([self.to_row, column])
        if p.result_dtype == "float32":
            store_words(pointer, [T.reinterpret("uint32", T.Bind(v)) for v in pair])
        else:
            store_words(pointer, [pack_bf16(*pair)])

    def _value(self, value: Expr, weight_row: Expr) -> Expr:
        """A finished sum: scaled by row, with the bias (in the first split alone)."""
        if self.x_scale is not None:
            value = value * (self.row_scale * self.w_scale[self.expert, weight_row])
        elif self.w_scale is not None and not self.problem.group:
            value = value * self.w_scale[self.expert, weight_row]
        if self.bias is not None:
            bias = self.bias[self.expert, weight_row]
            value = value + (bias if self.splits == 1 else T.Select(self.split == 0, bias, T.float32(0)))
        return value


def weights(problem: GemmProblem, prefix: str = "") -> tuple[Any, Any]:
    """The arguments w and w_scale (None where weights have no scales)."""
    p, per_row = problem, (problem.num_experts, problem.weight_rows)
    if not p.code_bits:
        scale = tensor(f"{prefix}w_scale", per_row, "float32") if p.dtype == "float8_e4m3fn" else None
        return tensor(f"{prefix}w", (*per_row, p.depth), p.dtype), scale
    units = p.num_experts, p.weight_rows // UNIT_ROWS, p.depth // UNIT_DEPTH
    w = tensor(f"{prefix}w", (*units, p.code_bits * 32), "uint32")
    if not p.group:
        return w, tensor(f"{prefix}w_scale", per_row, "float32")
    return w, tensor(f"{prefix}w_scale", (p.num_experts, p.depth // p.group, p.weight_rows), "bfloat16")
