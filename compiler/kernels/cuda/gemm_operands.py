"""What both grouped GEMMs read and how they write: the arguments, and the way of a sum from registers to memory."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.tirx.script import builder as T

from moec.compiler.kernels.cuda.activation import activate
from moec.compiler.kernels.cuda.emit import Expr, pack_bf16, size, store_words, tensor
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem
from moec.passes.ir.activation import Activation


class Operands:
    """The arguments of a GEMM, and the emitter of its results.

    splits: of K over blocks.  gather: rows of x are tokens, found by slot; else they lie in slot_order.
    """

    def __init__(self, problem: GemmProblem, splits: int, gather: bool) -> None:
        p, self.problem, self.splits, self.gather = problem, problem, splits, gather
        x_rows, self.slots, self.tiles = size("x_rows"), size("slots"), size("tiles")
        self.x = tensor("x", (x_rows, p.depth), p.dtype)
        self.w = tensor("w", (p.num_experts, p.weight_rows, p.depth), p.dtype)
        self.x_rows = x_rows
        self.x_scale = self.w_scale = None
        if p.dtype == "float8_e4m3fn":
            self.x_scale = tensor("x_scale", (x_rows,), "float32")
            self.w_scale = tensor("w_scale", (p.num_experts, p.weight_rows), "float32")
        self.bias = tensor("bias", (p.num_experts, p.weight_rows), "float32") if p.has_bias else None
        self.slot_order = tensor("slot_order", (self.slots,), "int32")
        self.expert_start = tensor("expert_start", (p.num_experts + 1,), "int32")
        self.tile_expert = tensor("tile_expert", (self.tiles,), "int32")
        self.tile_row = tensor("tile_row", (self.tiles,), "int32")
        dtype = "bfloat16" if p.mode == "gate_up" else p.part_dtype
        self.y = tensor("y", (self.slots * splits, p.columns), dtype)

    def source_row(self, row: Expr) -> Expr:
        """The row of x that a row of the result is made from."""
        return self.slot_order[row] // self.problem.slots_per_token if self.gather else row

    def begin_row(self, row: Expr, expert: Expr, split: Expr) -> None:
        """Reads what the results of a row need: its scale, and where they go."""
        self.expert, self.split = expert, split
        if self.x_scale is not None:
            self.row_scale = T.Bind(self.x_scale[self.source_row(row)])
        self.to_row = row
        if self.problem.mode == "down":
            self.to_row = T.Bind(T.Cast("int64", self.slot_order[row]) + T.Cast("int64", split) * self.slots)

    def store(self, column: Expr, sums: Sequence[Sequence[Expr]]) -> None:
        """Two neighbouring results from column on: sums[half][0 or 1] are the f32 sums, half 1 those of `up`."""
        pair = []
        for j in range(2):
            value = self._value(sums[0][j], column + j)
            if self.problem.mode == "gate_up":
                up = self._value(sums[1][j], self.problem.columns + column + j) if len(sums) == 2 else None
                value = activate(Activation.parse(self.problem.act), value, up)
            pair.append(value)
        pointer = self.y.ptr_to([self.to_row, column])
        if self.problem.mode == "down" and self.problem.part_dtype == "float32":
            store_words(pointer, [T.reinterpret("uint32", T.Bind(v)) for v in pair])
        else:
            store_words(pointer, [pack_bf16(*pair)])

    def _value(self, value: Expr, weight_row: Expr) -> Expr:
        """A finished sum: scaled, with the bias (in the first split alone)."""
        if self.w_scale is not None:
            value = value * (self.row_scale * self.w_scale[self.expert, weight_row])
        if self.bias is not None:
            bias = self.bias[self.expert, weight_row]
            value = value + (bias if self.splits == 1 else T.Select(self.split == 0, bias, T.float32(0)))
        return value
