"""Grouped GEMMs by cp.async, ldmatrix and mma.sync: every architecture, a few rows per expert or thousands.

Call: kernel(x, w, [x_scale, w_scale,] [bias,] slot_order, expert_start, tile_expert, tile_row, y).
x: gate_up's tokens [T,K], gathered by slot; down's h [S,K].  w [E, weight rows, K] as moec::experts has it (gate rows
first).  slot_order .. tile_row: of dispatch.py, with tile_rows = Tile.rows.  y: h bf16[S,F], or part [splits*S, H].
Every weight is read once per block of rows; sums are in f32, in one order, whatever the routing.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.cuda.activation import activate
from moec.compiler.kernels.cuda.emit import Expr, Local, define, pack_bf16, ptx, size, store_words, sync, tensor, when
from moec.compiler.kernels.cuda.gemm_problem import ROW_BYTES, GemmProblem, Tile
from moec.passes.ir.activation import Activation

MMA = {
    "bfloat16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "float8_e4m3fn": "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
}
LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
COPY = "cp.async.cg.shared.global"
KSTEPS = 4  # of 32 bytes in a row of 128


def build(problem: GemmProblem, tile: Tile) -> Any:
    """The TIRx function; ask tile.refusal first."""
    return define(lambda: _Gemm(problem, tile).emit())


def swizzled(row: Expr, chunk: Expr) -> Expr:
    """Where 16-byte chunk `chunk` of a 128-byte row lies: no two of 8 rows share a bank."""
    return row * ROW_BYTES + T.bitwise_xor(chunk, row % 8) * 16


class _Gemm:
    """The emitter of one kernel."""

    def __init__(self, problem: GemmProblem, tile: Tile) -> None:
        self.problem, self.tile = problem, tile
        self.halves = problem.halves
        self.out = tile.columns // self.halves  # result columns of a block
        self.m_tiles = tile.rows // tile.warps_m // 16
        self.n_tiles = self.out // tile.warps_n // 8
        self.rows_per_pass = tile.threads // 8  # 8 threads copy a row of 128 bytes

    def emit(self) -> None:
        self._arguments()
        T.device_entry()
        p, t = self.problem, self.tile
        tile_index, column_block = T.cta_id([self.tiles, p.columns // self.out * t.splits])
        self.split = T.Bind(column_block // (p.columns // self.out)) if t.splits > 1 else T.int32(0)
        self.column = T.Bind(column_block % (p.columns // self.out) * self.out)
        thread = T.thread_id([t.threads])
        self.warp, self.lane = thread // 32, thread % 32
        self.copy_row, self.chunk = thread // 8, thread % 8
        self.shared = T.alloc_buffer((t.shared_bytes,), "uint8", scope="shared.dyn", align=128)
        expert = T.Bind(self.tile_expert[tile_index])
        with when(expert >= 0):
            self.expert = expert
            self.first_row = T.Bind(self.tile_row[tile_index])
            self.end_row = T.Bind(self.expert_start[expert + 1])
            self._sources()
            self._multiply()
            self._finish()

    def _arguments(self) -> None:
        p = self.problem
        n, slots, self.tiles = size("x_rows"), size("slots"), size("tiles")
        self.slots = slots
        self.x = tensor("x", (n, p.depth), p.dtype)
        self.w = tensor("w", (p.num_experts, p.weight_rows, p.depth), p.dtype)
        self.scales = None
        if p.dtype == "float8_e4m3fn":
            self.scales = (
                tensor("x_scale", (n,), "float32"),
                tensor("w_scale", (p.num_experts, p.weight_rows), "float32"),
            )
        self.bias = tensor("bias", (p.num_experts, p.weight_rows), "float32") if p.has_bias else None
        self.slot_order = tensor("slot_order", (slots,), "int32")
        self.expert_start = tensor("expert_start", (p.num_experts + 1,), "int32")
        self.tile_expert = tensor("tile_expert", (self.tiles,), "int32")
        self.tile_row = tensor("tile_row", (self.tiles,), "int32")
        dtype = "bfloat16" if p.mode == "gate_up" else p.part_dtype
        self.y = tensor("y", (slots * self.tile.splits, p.columns), dtype)

    def _source_row(self, row: Expr) -> Expr:
        """The row of x that a row of the result is made from."""
        return self.slot_order[row] // self.problem.slots_per_token if self.problem.mode == "gate_up" else row

    def _sources(self) -> None:
        """Where this thread's chunks of a tile come from, as element offsets (64 bits: stacks pass 2**31 elements)."""
        p, element = self.problem, 16 // self.problem.element_bytes
        self.x_passes = max(1, self.tile.rows // self.rows_per_pass)
        self.w_passes = self.tile.columns // self.rows_per_pass
        self.x_at, self.x_bytes = Local(self.x_passes, "int64", "x_at"), Local(self.x_passes, "uint32", "x_bytes")
        for i in range(self.x_passes):
            row = T.Bind(self.first_row + self.copy_row + i * self.rows_per_pass)
            self.x_at[i], self.x_bytes[i] = T.int64(0), T.uint32(0)  # a row past the end copies zeros
            with when(row < self.end_row):
                source = T.Cast("int64", self._source_row(row))
                self.x_at[i] = source * p.depth + T.Cast("int64", self.chunk * element)
                self.x_bytes[i] = T.uint32(16)
        self.w_at = Local(self.w_passes, "int64", "w_at")
        for i in range(self.w_passes):
            local = self.copy_row + i * self.rows_per_pass
            weight_row = local // self.out * p.columns + self.column + local % self.out
            self.w_at[i] = (
                T.Cast("int64", self.expert) * (p.weight_rows * p.depth)
                + T.Cast("int64", weight_row) * p.depth
                + T.Cast("int64", self.chunk * element)
            )

    def _copy(self, stage: Expr, step: Expr) -> None:
        """Starts copying the tiles of a step of K into a stage of the ring."""
        t = self.tile
        base = T.Bind(stage * ((t.rows + t.columns) * ROW_BYTES))
        offset = T.Bind(T.Cast("int64", step * self.problem.block_depth))

        def x_chunk(i: int) -> None:
            to = self.shared.ptr_to([base + swizzled(self.copy_row + i * self.rows_per_pass, self.chunk)])
            ptx(COPY, to, self.x.ptr_to([0, self.x_at[i] + offset]), 16, self.x_bytes[i])

        for i in range(self.x_passes):
            if t.rows < self.rows_per_pass:
                with when(self.copy_row < t.rows):
                    x_chunk(i)
            else:
                x_chunk(i)
        for i in range(self.w_passes):
            place = t.rows * ROW_BYTES + swizzled(self.copy_row + i * self.rows_per_pass, self.chunk)
            ptx(COPY, self.shared.ptr_to([base + place]), self.w.ptr_to([0, 0, self.w_at[i] + offset]), 16)

    def _multiply(self) -> None:
        t, steps = self.tile, self.problem.steps
        first = T.Bind(self.split * steps // t.splits)
        count = T.Bind((self.split + 1) * steps // t.splits - first)
        self.acc = Local(self.halves * self.m_tiles * self.n_tiles * 4, name="acc")
        self.a = Local(self.m_tiles * 4, "uint32", "a")
        self.b = Local(self.halves * self.n_tiles * 2, "uint32", "b")
        ring = Local(2, "int32", "ring")  # the stage to read, the stage to fill
        self.acc.fill(0)
        for s in range(t.stages - 1):
            with when(s < count):
                self._copy(T.int32(s), first + s)
            ptx("cp.async.commit_group")
        ring[0], ring[1] = T.int32(0), T.int32(t.stages - 1)
        with T.serial(count) as step:
            ptx("cp.async.wait_group", t.stages - 2)
            sync()  # the stage has landed for all threads, and the one before it has been read by all
            with when(step + (t.stages - 1) < count):
                self._copy(ring[1], first + step + (t.stages - 1))
            ptx("cp.async.commit_group")
            for k in range(KSTEPS):
                self._load_fragments(ring[0], k)
                self._mma()
            for r in range(2):
                ring[r] = T.Select(ring[r] == t.stages - 1, T.int32(0), ring[r] + 1)

    def _load_fragments(self, stage: Expr, k: int) -> None:
        t = self.tile
        base = T.Bind(stage * ((t.rows + t.columns) * ROW_BYTES))
        warp_m, warp_n = self.warp // t.warps_n, self.warp % t.warps_n
        for m in range(self.m_tiles):
            row = warp_m * (self.m_tiles * 16) + m * 16 + self.lane % 16
            place = base + swizzled(row, k * 2 + self.lane // 16)
            ptx(LDMATRIX, *[self.a[m * 4 + i] for i in range(4)], self.shared.ptr_to([place]))
        for h in range(self.halves):
            for n in range(self.n_tiles // 2):
                row = h * self.out + warp_n * (self.n_tiles * 8) + n * 16 + self.lane % 8 + self.lane // 16 * 8
                place = base + t.rows * ROW_BYTES + swizzled(row, k * 2 + self.lane // 8 % 2)
                at = h * self.n_tiles * 2 + n * 4
                ptx(LDMATRIX, *[self.b[at + i] for i in range(4)], self.shared.ptr_to([place]))

    def _mma(self) -> None:
        instruction = MMA[self.problem.dtype]
        for h in range(self.halves):
            for m in range(self.m_tiles):
                for n in range(self.n_tiles):
                    acc = [self.acc[self._at(h, m, n) + i] for i in range(4)]
                    a, b = [self.a[m * 4 + i] for i in range(4)], h * self.n_tiles * 2 + n * 2
                    ptx(instruction, *acc, *a, self.b[b], self.b[b + 1], *acc)

    def _at(self, h: int, m: int, n: int) -> int:
        return ((h * self.m_tiles + m) * self.n_tiles + n) * 4

    def _finish(self) -> None:
        """Registers to memory: activation and rounding, or the partial sums."""
        t = self.tile
        warp_m, warp_n = self.warp // t.warps_n, self.warp % t.warps_n
        for m in range(self.m_tiles):
            for upper in range(2):
                row = T.Bind(self.first_row + warp_m * (self.m_tiles * 16) + m * 16 + self.lane // 4 + upper * 8)
                with when(row < self.end_row):
                    self._bind_row(row)
                    for n in range(self.n_tiles):
                        column = T.Bind(self.column + warp_n * (self.n_tiles * 8) + n * 8 + self.lane % 4 * 2)
                        self._store(m, n, upper, column)

    def _bind_row(self, row: Expr) -> None:
        """What the epilogue of a row needs: its scale, and where it goes."""
        if self.scales is not None:
            self.row_scale = T.Bind(self.scales[0][self._source_row(row)])
        self.to_row = row
        if self.problem.mode == "down":
            self.to_row = T.Bind(T.Cast("int64", self.slot_order[row]) + T.Cast("int64", self.split) * self.slots)

    def _value(self, h: int, m: int, n: int, i: int, column: Expr) -> Expr:
        """A finished sum: scaled, with the bias (of the first split alone)."""
        value, at = self.acc[self._at(h, m, n) + i], h * self.problem.columns + column
        if self.scales is not None:
            value = value * (self.row_scale * self.scales[1][self.expert, at])
        if self.bias is not None:
            bias = self.bias[self.expert, at]
            value = value + (bias if self.tile.splits == 1 else T.Select(self.split == 0, bias, T.float32(0)))
        return value

    def _store(self, m: int, n: int, upper: int, column: Expr) -> None:
        pair = []
        for j in range(2):
            value = self._value(0, m, n, upper * 2 + j, column + j)
            if self.problem.mode == "gate_up":
                up = self._value(1, m, n, upper * 2 + j, column + j) if self.halves == 2 else None
                value = activate(Activation.parse(self.problem.act), value, up)
            pair.append(value)
        pointer = self.y.ptr_to([self.to_row, column])
        if self.problem.mode == "down" and self.problem.part_dtype == "float32":
            store_words(pointer, [T.reinterpret("uint32", T.Bind(v)) for v in pair])
        else:
            store_words(pointer, [pack_bf16(*pair)])
