"""Grouped GEMMs by cp.async, ldmatrix and mma.sync: every architecture, a few rows per expert or thousands.

Call: kernel(x, w, [x_scale, w_scale,] [bias,] slot_order, expert_start, tile_expert, tile_row, y).
x: gate_up's tokens [T,K], gathered by slot; down's h [S,K].  w [E, weight rows, K] as moec::experts has it (gate rows
first).  slot_order .. tile_row: of dispatch.py, with tile_rows = Tile.rows.  y: h bf16[S,F], or part [splits*S, H].
Every weight is read once per block of rows; sums are in f32, in one order, whatever the routing.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.cuda.emit import Expr, Local, define, ptx, sync, when
from moec.compiler.kernels.cuda.gemm_operands import Operands
from moec.compiler.kernels.cuda.gemm_problem import ROW_BYTES, GemmProblem, Tile

MMA = {
    "bfloat16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "float8_e4m3fn": "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
}
LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
COPY = "cp.async.cg.shared.global"
KSTEPS = 4  # of 32 bytes in a row of 128


def build(problem: GemmProblem, tile: Tile) -> Any:
    """The TIRx function; ask tile.refusal first."""
    return define(lambda: emit(problem, tile, MmaGemm))


def emit(problem: GemmProblem, tile: Tile, gemm: type[MmaGemm]) -> None:
    """The kernel: a block makes one tile of the tile map and of the columns."""
    operands = Operands(problem, tile.splits, problem.gathers)
    column_blocks = problem.columns // (tile.columns // problem.halves)
    T.device_entry()
    tile_index, block = T.cta_id([operands.tiles, column_blocks * tile.splits])
    split = T.Bind(block // column_blocks) if tile.splits > 1 else T.int32(0)
    column = T.Bind(block % column_blocks * (tile.columns // problem.halves))
    shared = T.alloc_buffer((tile.shared_bytes(problem),), "uint8", scope="shared.dyn", align=128)
    expert = T.Bind(operands.tile_expert[tile_index])
    with when(expert >= 0):
        first_row = T.Bind(operands.tile_row[tile_index])
        end_row = T.Bind(operands.expert_start[expert + 1])
        gemm(problem, tile, operands, shared).make_tile(expert, (first_row, end_row), column, split)


def swizzled(row: Expr, chunk: Expr) -> Expr:
    """Where 16-byte chunk `chunk` of a 128-byte row lies: no two of 8 rows share a bank."""
    return row * ROW_BYTES + T.bitwise_xor(chunk, row % 8) * 16


class MmaGemm:
    """The emitter of tiles: weights as rows of numbers, copied to shared memory beside the rows of x.

    operands: as Operands. shared: u8 of tile.shared_bytes, for the ring.
    """

    def __init__(self, problem: GemmProblem, tile: Tile, operands: Any, shared: Any) -> None:
        self.problem, self.tile, self.operands, self.shared = problem, tile, operands, shared
        self.halves = problem.halves
        self.out = tile.columns // self.halves  # result columns of a block
        self.m_tiles = tile.rows // tile.warps_m // 16
        self.n_tiles = self.out // tile.warps_n // 8
        self.rows_per_pass = tile.threads // 8  # 8 threads copy a row of 128 bytes
        self.stage_bytes = tile.stage_bytes(problem)
        self.w_place = tile.rows * ROW_BYTES  # of the weights in a stage
        self.thread = T.thread_id([tile.threads])
        self.warp, self.lane = self.thread // 32, self.thread % 32
        self.copy_row, self.chunk = self.thread // 8, self.thread % 8

    def make_tile(self, expert: Expr, rows: tuple[Expr, Expr], column: Expr, split: Expr) -> None:
        """Rows first .. end (at most tile.rows of them) of an expert, self.out columns from column on."""
        self.expert, (self.first_row, self.end_row), self.column, self.split = expert, rows, column, split
        self._sources()
        self._multiply()
        self._finish()

    def _sources(self) -> None:
        """Where this thread's chunks of a tile come from, as element offsets (64 bits: stacks pass 2**31 elements)."""
        p, element = self.problem, 16 // self.problem.element_bytes
        self.x_passes = max(1, self.tile.rows // self.rows_per_pass)
        self.x_at, self.x_bytes = Local(self.x_passes, "int64", "x_at"), Local(self.x_passes, "uint32", "x_bytes")
        for i in range(self.x_passes):
            row = T.Bind(self.first_row + self.copy_row + i * self.rows_per_pass)
            self.x_at[i], self.x_bytes[i] = T.int64(0), T.uint32(0)  # a row past the end copies zeros
            with when(row < self.end_row):
                source = T.Cast("int64", self.operands.source_row(row))
                self.x_at[i] = source * p.depth + T.Cast("int64", self.chunk * element)
                self.x_bytes[i] = T.uint32(16)
        self._weight_sources()

    def _weight_sources(self) -> None:
        p, element = self.problem, 16 // self.problem.element_bytes
        self.w_passes = self.tile.columns // self.rows_per_pass
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
        base = T.Bind(stage * self.stage_bytes)
        offset = T.Bind(T.Cast("int64", step * self.problem.block_depth))

        def x_chunk(i: int) -> None:
            to = self.shared.ptr_to([base + swizzled(self.copy_row + i * self.rows_per_pass, self.chunk)])
            ptx(COPY, to, self.operands.x.ptr_to([0, self.x_at[i] + offset]), 16, self.x_bytes[i])

        for i in range(self.x_passes):
            if t.rows < self.rows_per_pass:
                with when(self.copy_row < t.rows):
                    x_chunk(i)
            else:
                x_chunk(i)
        self._copy_weights(base, step)

    def _copy_weights(self, base: Expr, step: Expr) -> None:
        offset = T.Cast("int64", step * self.problem.block_depth)
        for i in range(self.w_passes):
            place = self.w_place + swizzled(self.copy_row + i * self.rows_per_pass, self.chunk)
            ptx(COPY, self.shared.ptr_to([base + place]), self.operands.w.ptr_to([0, 0, self.w_at[i] + offset]), 16)

    def _multiply(self) -> None:
        t, steps = self.tile, self.problem.steps
        first = T.Bind(self.split * steps // t.splits)
        count = T.Bind((self.split + 1) * steps // t.splits - first)
        self.acc = Local(self.halves * self.m_tiles * self.n_tiles * 4, name="acc")
        self._fragments()
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
            self._step(T.Bind(ring[0] * self.stage_bytes))
            for r in range(2):
                ring[r] = T.Select(ring[r] == t.stages - 1, T.int32(0), ring[r] + 1)

    def _fragments(self) -> None:
        """The registers that hold operands."""
        self.a = Local(self.m_tiles * 4, "uint32", "a")
        self.b = Local(self.halves * self.n_tiles * 2, "uint32", "b")

    def _step(self, base: Expr) -> None:
        """The products of a stage, which begins at base."""
        for k in range(KSTEPS):
            self._load_x(base, k, 0)
            self._load_weights(base, k)
            self._mma()

    def _load_x(self, base: Expr, k: int, at: int) -> None:
        """Fragments of the k-th 32 bytes of x into a[at ..]."""
        for m in range(self.m_tiles):
            row = self.warp // self.tile.warps_n * (self.m_tiles * 16) + m * 16 + self.lane % 16
            place = base + swizzled(row, k * 2 + self.lane // 16)
            ptx(LDMATRIX, *[self.a[at + m * 4 + i] for i in range(4)], self.shared.ptr_to([place]))

    def _load_weights(self, base: Expr, k: int) -> None:
        warp_n = self.warp % self.tile.warps_n
        for h in range(self.halves):
            for n in range(self.n_tiles // 2):
                row = h * self.out + warp_n * (self.n_tiles * 8) + n * 16 + self.lane % 8 + self.lane // 16 * 8
                place = base + self.w_place + swizzled(row, k * 2 + self.lane // 8 % 2)
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
                    self.operands.begin_row(row, self.expert, self.split)
                    for n in range(self.n_tiles):
                        column = T.Bind(self.column + warp_n * (self.n_tiles * 8) + n * 8 + self.lane % 4 * 2)
                        at = [self._at(h, m, n) + upper * 2 for h in range(self.halves)]
                        self.operands.store(column, [[self.acc[i + j] for j in range(2)] for i in at])
