"""Grouped GEMMs of sm_90a for many rows: TMA brings tiles, two warp groups multiply them by wgmma, blocks stay.

Call: as gemm_mma.py, with x in slot_order for both modes (`gather.py` makes gate_up's), and `blocks`: how many blocks
to launch, one per multiprocessor. tile_rows is 128.
Results of an expert are made column block by column block, its rows innermost: a block of weights is read from memory
once and x stays in the L2 cache. One TMA thread fills a ring of stages; a stage is given back one step after its
products were issued, so the tensor cores always have work in flight.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moec.compiler.codegen.cuda import TensorBox
from moec.compiler.codegen.cuda_archs import Architecture
from moec.compiler.kernels.cuda.emit import Expr, Local, define, device, do, ptx, sync, when
from moec.compiler.kernels.cuda.gemm_operands import Operands
from moec.compiler.kernels.cuda.gemm_problem import ROW_BYTES, GemmProblem

ROWS, GROUPS = 128, 2  # rows of a tile; warp groups that multiply, 64 rows each
THREADS = (GROUPS + 1) * 128
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
TMA = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
TYPES = {"bfloat16": ("k16", "f32.bf16.bf16"), "float8_e4m3fn": ("k32", "f32.e4m3.e4m3")}
KSTEPS = 4


@dataclasses.dataclass(frozen=True)
class WgmmaTile:
    """columns: of the result that a block makes at a time. stages: of the ring."""

    columns: int = 128
    stages: int = 4

    def shared_bytes(self, problem: GemmProblem) -> int:
        """Shared memory of a block: the whole ring and its barriers."""
        return self.stages * ((ROWS + self.columns * problem.halves) * ROW_BYTES + 16)

    def refusal(self, problem: GemmProblem, arch: Architecture) -> str | None:
        """Why the tile does not do the problem on the architecture, or None."""
        if reason := problem.refusal():
            return reason
        if arch.tensor != "wgmma":
            return f"{arch.name} has no wgmma"
        if problem.code_bits or problem.mode == "gate_up_part":
            return "codes and split K go by mma.sync"
        if problem.columns % self.columns:
            return f"{problem.columns} columns, not a multiple of the tile's {self.columns}"
        if self.columns % 8 or not 8 <= self.columns * problem.halves <= 256:
            return f"{self.columns} columns, not a multiple of 8 with {problem.halves} accumulators within 256"
        if self.shared_bytes(problem) > arch.block_shared_bytes:
            return f"{self.shared_bytes(problem)} bytes of shared memory, a block has {arch.block_shared_bytes}"
        return None

    def boxes(self, problem: GemmProblem) -> dict[str, TensorBox]:
        """The tensor maps of the kernel, for codegen.cuda.lower."""
        depth = problem.block_depth
        return {"x_map": TensorBox("x", depth, ROWS), "w_map": TensorBox("w", depth, self.columns)}


def build(problem: GemmProblem, tile: WgmmaTile) -> Any:
    """The TIRx function; ask tile.refusal first."""
    return define(lambda: _Gemm(problem, tile).emit())


def _fence(register: Expr) -> None:
    """Keeps the compiler from moving a register across the asynchronous products that write it."""
    source = '__device__ __forceinline__ void moec_fence(float& r) { asm volatile("" : "+f"(r) :: "memory"); }'
    do(device("moec_fence", "void", source, register))


class _Gemm:
    """The emitter of one kernel."""

    def __init__(self, problem: GemmProblem, tile: WgmmaTile) -> None:
        self.problem, self.tile, self.halves = problem, tile, problem.halves
        self.x_bytes, self.w_bytes = ROWS * ROW_BYTES, tile.columns * ROW_BYTES  # of a stage; w_bytes of one half
        self.stage_bytes = self.x_bytes + self.halves * self.w_bytes
        self.registers = tile.columns // 2  # of an accumulator of 64 rows, per thread
        self.column_blocks = problem.columns // tile.columns

    def emit(self) -> None:
        p, stages = self.problem, self.tile.stages
        o = self.operands = Operands(p, 1, gather=False)
        blocks = T.arg("blocks", T.int32())
        x_map = self._map("x_map", o.x, o.x_rows, ROWS)
        w_map = self._map("w_map", o.w, p.num_experts * p.weight_rows, self.tile.columns)
        T.device_entry()
        block, thread = T.cta_id([blocks]), T.thread_id([THREADS])
        group, warp, lane = T.warpgroup_id([GROUPS + 1]), T.warp_id([(GROUPS + 1) * 4]), T.lane_id([32])
        self.lane, self.group, self.warp = lane, group, warp
        total = stages * self.stage_bytes + 16 * stages
        self.shared = T.alloc_buffer((total,), "uint8", scope="shared.dyn", align=1024)
        with when(thread == 0):
            for s in range(stages):
                ptx("mbarrier.init.shared.b64", self._full(s), T.uint32(1))
                ptx("mbarrier.init.shared.b64", self._empty(s), T.uint32(GROUPS * 4))
        ptx("fence.mbarrier_init.release.cluster")
        ptx("fence.proxy.async.shared::cta")
        sync()
        self.work, self.ring = Local(4, "int32", "work"), Local(3, "int32", "ring")
        self.work[0] = block
        self.ring[0], self.ring[1] = T.int32(0), T.int32(0)  # stage, phase
        with T.If(group == GROUPS):
            with T.Then():
                ptx("setmaxnreg.dec.sync.aligned.u32", PRODUCER_REGISTERS)
                with when(thread == GROUPS * 128):
                    self._each_tile(blocks, lambda: self._produce(x_map, w_map))
            with T.Else():
                ptx("setmaxnreg.inc.sync.aligned.u32", CONSUMER_REGISTERS)
                self._consume(blocks)

    def _map(self, name: str, buffer: Any, rows: Expr, box_rows: int) -> Expr:
        """A tensor map of [rows, depth] in boxes of 128 bytes by box_rows, with the 128-byte swizzle."""
        p = self.problem
        var = T.Bind(T.tvm_stack_alloca("tensormap", 1), T.handle("tensormap").ty)
        IRBuilder.name(name, var)
        do(
            T.tensormap_encode_tiled(
                var, buffer.data, p.depth, rows, p.depth * p.element_bytes, p.block_depth, box_rows, 1, 1,
                descriptor_dtype=p.dtype, rank=2, swizzle=3, l2_promotion=2,
            )
        )  # fmt: skip
        return var

    def _full(self, stage: Expr) -> Expr:
        return self.shared.ptr_to([self.tile.stages * self.stage_bytes + stage * 8])

    def _empty(self, stage: Expr) -> Expr:
        return self.shared.ptr_to([self.tile.stages * (self.stage_bytes + 8) + stage * 8])

    def _each_tile(self, blocks: Expr, body: Any) -> None:
        """body for each (tile, column block) of this thread block; sets expert, first_row, end_row, column."""
        o, limit = self.operands, self.operands.tiles * self.column_blocks
        with T.While(self.work[0] < limit):
            any_tile = T.Bind(self.work[0] // self.column_blocks)
            expert = T.Bind(o.tile_expert[any_tile])
            with when(expert >= 0):
                start, end = T.Bind(o.expert_start[expert]), T.Bind(o.expert_start[expert + 1])
                first_tile = T.Bind(any_tile - (o.tile_row[any_tile] - start) // ROWS)
                tiles = T.Bind((end - start + (ROWS - 1)) // ROWS)
                local = T.Bind(self.work[0] - first_tile * self.column_blocks)
                self.expert, self.end_row = expert, end
                self.column = T.Bind(local // tiles * self.tile.columns)
                self.first_row = T.Bind(start + local % tiles * ROWS)
                body()
            self.work[0] = self.work[0] + blocks

    def _advance(self) -> None:
        self.ring[0] = self.ring[0] + 1
        with when(self.ring[0] == self.tile.stages):
            self.ring[0] = T.int32(0)
            self.ring[1] = T.bitwise_xor(self.ring[1], T.int32(1))

    def _produce(self, x_map: Expr, w_map: Expr) -> None:
        p = self.problem
        with T.serial(p.steps) as step:
            stage = self.ring[0]
            do(T.cuda.mbarrier_wait(self._empty(stage), T.bitwise_xor(self.ring[1], T.int32(1))))
            ptx("mbarrier.arrive.expect_tx.shared.b64", self._full(stage), T.uint32(self.stage_bytes))
            base, depth = stage * self.stage_bytes, step * p.block_depth
            ptx(TMA, self.shared.ptr_to([base]), T.address_of(x_map), depth, self.first_row, self._full(stage))
            for h in range(self.halves):
                row = self.expert * p.weight_rows + h * p.columns + self.column
                to = self.shared.ptr_to([base + self.x_bytes + h * self.w_bytes])
                ptx(TMA, to, T.address_of(w_map), depth, row, self._full(stage))
            self._advance()

    def _consume(self, blocks: Expr) -> None:
        self.acc = Local(self.halves * self.registers, name="acc")
        descriptors = Local(1 + self.halves, "uint64", "descriptors")
        places = [self.group * (64 * ROW_BYTES), *(self.x_bytes + h * self.w_bytes for h in range(self.halves))]
        for i, place in enumerate(places):
            pointer = self.shared.ptr_to([place])
            # 128-byte swizzle (3); 8 rows of 128 bytes are 64 units of 16 bytes
            do(T.cuda.wgmma.encode_matrix_descriptor(T.address_of(descriptors[i]), pointer, 1, 64, 3))

        def body() -> None:
            self._multiply(descriptors)
            self._finish()

        self._each_tile(blocks, body)

    def _multiply(self, descriptors: Local) -> None:
        depth, types = TYPES[self.problem.dtype]
        instruction = f"wgmma.mma_async.sync.aligned.m64n{self.tile.columns}{depth}.{types}"
        flags = (1, 1, 0, 0) if self.problem.dtype == "bfloat16" else (1, 1)
        for i in range(self.acc.size):
            _fence(self.acc[i])
        with T.serial(self.problem.steps) as step:
            do(T.cuda.mbarrier_wait(self._full(self.ring[0]), self.ring[1]))
            offset = T.Bind(T.Cast("uint64", self.ring[0] * (self.stage_bytes // 16)))
            ptx("wgmma.fence.sync.aligned")
            for k in range(KSTEPS):
                for h in range(self.halves):
                    acc = [self.acc[h * self.registers + i] for i in range(self.registers)]
                    a, b = (descriptors[i] + offset + T.uint64(2 * k) for i in (0, 1 + h))
                    ptx(instruction, *acc, a, b, T.ptx.pred(step * KSTEPS + k > 0), *flags)
            ptx("wgmma.commit_group.sync.aligned")
            ptx("wgmma.wait_group.sync.aligned", 1)
            with when(step > 0):
                self._give_back(self.ring[2])  # what the step before has read
            self.ring[2] = self.ring[0]
            self._advance()
        ptx("wgmma.wait_group.sync.aligned", 0)
        self._give_back(self.ring[2])
        for i in range(self.acc.size):
            _fence(self.acc[i])

    def _give_back(self, stage: Expr) -> None:
        with when(self.lane == 0):
            ptx("mbarrier.arrive.shared.b64", self._empty(stage), T.uint32(1))

    def _finish(self) -> None:
        for upper in range(2):
            row = T.Bind(self.first_row + self.group * 64 + self.warp % 4 * 16 + self.lane // 4 + upper * 8)
            with when(row < self.end_row):
                self.operands.begin_row(row, self.expert, T.int32(0))
                for i in range(self.tile.columns // 8):
                    at = [h * self.registers + i * 4 + upper * 2 for h in range(self.halves)]
                    column = T.Bind(self.column + i * 8 + self.lane % 4 * 2)
                    self.operands.store(column, [[self.acc[a + j] for j in range(2)] for a in at])
