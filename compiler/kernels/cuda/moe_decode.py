"""A whole expert layer for a few tokens in one launch: router, gate, both GEMMs and the weighted sum.

Call: kernel(x, router, [router_bias,] [selection_bias,] up_w, [up_w_scale,] [up_bias,] down_w, [down_w_scale,]
[down_bias,] [shared_weight,] logits, h, part, barrier, weights, experts, y, n, blocks). x bf16[T,H], T <= 16 ->
weights f32[T,K] and experts i32[T,K], what the gate chose, and y bf16[T,H]; scratch: logits f32[T,E], h bf16[S,F],
part f32[splits*S,H]; barrier i32[2], 0 before the first launch and again after each.

Four steps, a barrier of the whole grid between them: (1) router logits, spread over all warps; every block then routes
for itself, in shared memory, so that nobody waits for a router; (2) gate_up, a block per expert and columns, the rows
of an expert together; (3) down, the same; (4) the weighted sum, in one order: the same inputs give the same bits.
Weights of experts that no token chose are not read; those of the others once.

The barrier spins, so all blocks must be resident together: a cooperative launch, blocks at most the multiprocessors
times what fits on one (CudaKernel.blocks_per_sm). Results do not depend on blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.codegen.cuda_archs import Architecture
from moec.compiler.kernels.cuda import gate, gate_linear
from moec.compiler.kernels.cuda.emit import (
    WARP,
    Expr,
    Local,
    define,
    device,
    do,
    pack_bf16,
    ptx,
    size,
    store_words,
    sync,
    tensor,
    when,
)
from moec.compiler.kernels.cuda.gate_linear import Router, count_in, read_fresh
from moec.compiler.kernels.cuda.gemm_codes import CodesGemm
from moec.compiler.kernels.cuda.gemm_mma import MmaGemm
from moec.compiler.kernels.cuda.gemm_operands import Operands, weights
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem, Tile
from moec.compiler.kernels.cuda.kernel import CudaKernel
from moec.compiler.kernels.gate.problem import GateProblem

MAX_TOKENS = 16  # rows of a tile: an expert sees a token once
COLUMNS = 4  # of the weighted sum, per thread
BLOCKS_PER_SM = 2  # of the default tiles


@dataclasses.dataclass(frozen=True)
class DecodeProblem:
    """gate: with its router (hidden H).  up, down: of the layer's GEMMs.  num_shared, has_shared_weight: as in them."""

    gate: GateProblem
    up: GemmProblem
    down: GemmProblem
    num_shared: int = 0
    has_shared_weight: bool = False

    @property
    def max_slots(self) -> int:
        """Of the largest launch, which has MAX_TOKENS tokens."""
        return MAX_TOKENS * self.up.slots_per_token

    @property
    def routing_bytes(self) -> int:
        """Shared memory for what a block knows of the routing."""
        return 8 * MAX_TOKENS * self.gate.gate.top_k + 4 * (6 * self.max_slots + 1)

    def refusal(self) -> str | None:
        """Why the kernel does not take the problem, or None."""
        if reason := gate_linear.refusal(self.gate):
            return reason
        modes = self.up.mode, self.down.mode, self.down.part_dtype
        if modes != ("gate_up", "down", "float32") or self.up.in_slot_order or self.down.reduce:
            return f"GEMMs of {modes[0]} and {modes[1]} in {modes[2]}; only gate_up and down in float32, not reduced"
        if "float8_e4m3fn" in (self.up.dtype, self.down.dtype):
            return "e4m3 rows: h would have to be rounded between the GEMMs"
        if self.up.slots_per_token != self.gate.gate.top_k + self.num_shared:
            return f"{self.up.slots_per_token} slots for a token, the gate gives {self.gate.gate.top_k}"
        return None


def refusal(problem: DecodeProblem, up: Tile, down: Tile, arch: Architecture) -> str | None:
    """Why the kernel does not do the problem with two tiles on the architecture, or None."""
    if reason := problem.refusal() or up.refusal(problem.up, arch) or down.refusal(problem.down, arch):
        return reason
    if up.threads != down.threads or (up.rows, down.rows) != (MAX_TOKENS, MAX_TOKENS):
        return f"tiles of {up.rows} and {down.rows} rows for {up.threads} and {down.threads} threads; 16, and as many"
    return None


def default_tiles(problem: DecodeProblem, arch: Architecture) -> tuple[Tile, Tile] | str:
    """The tiles of both GEMMs without tuning, two blocks to a multiprocessor; or why there are none."""
    reason: str | None = None
    for columns, warps in ((128, 4), (64, 2), (32, 1)):
        for stages in (4, 3, 2):
            up = Tile(MAX_TOKENS, columns, stages, 1, warps)
            down = dataclasses.replace(up, splits=min(2, problem.down.steps))
            needed = max(up.shared_bytes(problem.up), down.shared_bytes(problem.down)) + problem.routing_bytes
            reason = refusal(problem, up, down, arch)
            if reason is None and BLOCKS_PER_SM * (needed + 1024) <= arch.sm_shared_bytes:
                return up, down
    return reason or "two blocks do not fit"


def build(problem: DecodeProblem, up: Tile, down: Tile) -> Any:
    """The TIRx function; ask refusal first."""
    return define(lambda: _Decode(problem, up, down).emit())


def decode_kernel(problem: DecodeProblem, tiles: tuple[Tile, Tile], arch: str) -> CudaKernel:
    """The kernel with its default_tiles, as the catalogue lists it."""
    return CudaKernel(
        "moe_decode", arch, lambda: build(problem, *tiles), tensor="HMMA", blocks_per_sm=BLOCKS_PER_SM, cooperative=True
    )


class _Part:
    """Elements of a buffer from `start` on."""

    def __init__(self, buffer: Any, start: int) -> None:
        self.buffer, self.start = buffer, start

    def __getitem__(self, i: Expr) -> Expr:
        return self.buffer[self.start + i]

    def store(self, i: Expr, value: Expr) -> None:
        T.buffer_store(self.buffer, value, [self.start + i])


class _Own(Operands):
    """The operands of one of the two GEMMs inside this kernel: the routing lies in shared memory."""

    def __init__(self, problem: GemmProblem, splits: int, tensors: dict[str, Any], slots: Expr) -> None:
        self.problem, self.splits, self.gather, self.slots = problem, splits, problem.gathers, slots
        self.x_scale = None
        for name, value in tensors.items():
            setattr(self, name, value)


class _Decode:
    """The emitter of the kernel."""

    def __init__(self, problem: DecodeProblem, up: Tile, down: Tile) -> None:
        self.problem, self.tiles = problem, (up, down)
        self.top_k, self.per_token = problem.gate.gate.top_k, problem.up.slots_per_token
        self.num_routed = problem.up.num_experts - problem.num_shared
        self.threads = up.threads

    def emit(self) -> None:
        self._arguments()
        T.device_entry()
        self.block, self.thread = T.cta_id([self.blocks]), T.thread_id([self.threads])
        self.warp, self.lane = T.warp_id([self.threads // WARP]), T.lane_id([WARP])
        self._shared()
        self.slots = T.Bind(self.n * self.per_token)
        self._route()
        gemms = self._gemms()
        self._each_tile(gemms[0], self.tiles[0])
        self._barrier(2)
        self._each_tile(gemms[1], self.tiles[1])
        self._barrier(3)
        self._sum()
        self._leave()

    def _arguments(self) -> None:
        p, g = self.problem, self.problem.gate
        n = self.n = size("n")
        slots, parts = size("slots"), size("parts")
        self.x = tensor("x", (n, g.hidden), "bfloat16")
        self.router = tensor("router", (g.num_experts, g.hidden), g.weight_dtype)
        self.router_bias = tensor("router_bias", (g.num_experts,), g.bias_dtype) if g.bias_dtype else None
        self.chosen_by = None
        if g.gate.bias_on != "none":
            self.chosen_by = tensor("selection_bias", (g.num_experts,), g.selection_bias_dtype or "float32")
        self.stacks = []
        for name, gemm in (("up", p.up), ("down", p.down)):
            w, scale = weights(gemm, f"{name}_")
            shape = gemm.num_experts, gemm.weight_rows
            self.stacks.append((w, scale, tensor(f"{name}_bias", shape, "float32") if gemm.has_bias else None))
        self.shared_weight = tensor("shared_weight", (n,), "float32") if p.has_shared_weight else None
        self.logits = tensor("logits", (n, g.num_experts), "float32")
        self.h = tensor("h", (slots, p.up.columns), "bfloat16")
        self.part = tensor("part", (parts, p.down.columns), "float32")
        self.counters = tensor("barrier", (2,), "int32")
        chosen = n, self.top_k
        self.chosen = tensor("weights", chosen, "float32"), tensor("experts", chosen, "int32")
        self.y = tensor("y", (n, p.down.columns), "bfloat16")
        self.blocks = T.arg("blocks", T.int32())

    def _shared(self) -> None:
        p, slots = self.problem, self.problem.max_slots
        ring = max(t.shared_bytes(g) for t, g in zip(self.tiles, (p.up, p.down), strict=True))
        self.ring = T.alloc_buffer((ring,), "uint8", scope="shared.dyn", align=128)
        self.weights = T.alloc_buffer((MAX_TOKENS, self.top_k), "float32", scope="shared")
        self.experts = T.alloc_buffer((MAX_TOKENS, self.top_k), "int32", scope="shared")
        words = T.alloc_buffer((6 * slots + 1,), "int32", scope="shared")
        self.slot_expert, self.order, self.sorted_expert, self.tile_expert, self.tile_row, self.tile_end = (
            _Part(words, i * slots) for i in range(6)
        )
        self.num_tiles = _Part(words, 6 * slots)

    def _barrier(self, number: int) -> None:
        """All blocks have arrived `number` times, and what they wrote is visible."""
        sync()
        with when(self.thread == 0):
            do(grid_barrier(self.counters.ptr_to([0]), self.blocks * number))
        sync()

    def _leave(self) -> None:
        """The last block that is through puts the barrier's counter back."""
        sync()
        with when(self.thread == 0), when(count_in(self.counters.ptr_to([1]), self.blocks) == 1):
            T.buffer_store(self.counters, T.int32(0), [0])

    def _route(self) -> None:
        """Logits by all warps of the grid; gate and order of the slots by every block for itself."""
        g, warps = self.problem.gate, self.threads // WARP
        router, unit = Router(g, self.x, self.router, self.router_bias), Local(1, "int32", "unit")
        unit[0] = self.block * warps + self.warp
        with T.While(unit[0] < self.n * g.num_experts):
            token, expert = T.Bind(unit[0] % self.n), T.Bind(unit[0] // self.n)
            router.logits_of(token, expert, 1, self.lane, lambda e, v: T.buffer_store(self.logits, v, [token, e]))
            unit[0] = unit[0] + self.blocks * warps
        self._barrier(1)
        chosen_by = self.chosen_by
        by = None if chosen_by is None else lambda e: chosen_by[e]
        with T.serial(-(-MAX_TOKENS // warps)) as i:
            token = T.Bind(i * warps + self.warp)
            with when(token < self.n):
                fresh = lambda e: read_fresh(self.logits.ptr_to([token, e]))  # noqa: E731
                gate.choose(g, self.lane, fresh, by, (self.weights, self.experts), token)
        sync()
        self._publish()
        self._each_slot(self._read_slot)
        self._each_slot(self._place_slot)
        self._each_slot(self._begin_tile)

    def _publish(self) -> None:
        """The routing of the first block, which every block has, as a result: whoever records it reads it there."""
        with when(self.block == 0), T.serial(-(-MAX_TOKENS * self.top_k // self.threads)) as i:
            at = T.Bind(i * self.threads + self.thread)
            with when(at < self.n * self.top_k):
                token, k = T.Bind(at // self.top_k), T.Bind(at % self.top_k)
                for own, result in zip((self.weights, self.experts), self.chosen, strict=True):
                    T.buffer_store(result, own[token, k], [token, k])

    def _each_slot(self, body: Any) -> None:
        """body(slot) for every slot, spread over the threads of the block; then all have seen it."""
        with T.serial(-(-self.problem.max_slots // self.threads)) as i:
            slot = T.Bind(i * self.threads + self.thread)
            with when(slot < self.slots):
                body(slot)
        sync()

    def _read_slot(self, slot: Expr) -> None:
        """The expert of a slot; behind all others where it is held elsewhere."""
        token, k = T.Bind(slot // self.per_token), T.Bind(slot % self.per_token)
        self.slot_expert.store(slot, self.num_routed + k - self.top_k)
        with when(k < self.top_k):
            expert = T.Bind(self.experts[token, k])
            self.slot_expert.store(
                slot, T.Select(expert < self.num_routed, expert, T.int32(self.problem.up.num_experts))
            )

    def _place_slot(self, slot: Expr) -> None:
        """Its rank by (expert, slot): a stable sort of few numbers, each thread counting those before its own."""
        rank, own = Local(1, "int32", "rank"), T.Bind(self.slot_expert[slot])
        rank[0] = T.int32(0)
        with T.serial(self.slots) as other:
            expert = T.Bind(self.slot_expert[other])
            with when(T.Or(expert < own, T.And(expert == own, other < slot))):
                rank[0] = rank[0] + 1
        self.order.store(rank[0], slot)
        self.sorted_expert.store(rank[0], own)

    def _begin_tile(self, row: Expr) -> None:
        """The first row of an expert names its tile; the last row of all, how many there are."""
        own, tile, end = T.Bind(self.sorted_expert[row]), Local(1, "int32", "tile"), Local(1, "int32", "end")
        tile[0], end[0] = T.int32(-1), T.int32(0)
        with T.serial(self.slots) as other:
            expert = T.Bind(self.sorted_expert[other])
            held = expert < self.problem.up.num_experts
            first = T.Or(other == 0, self.sorted_expert[T.max(other - 1, T.int32(0))] != expert)
            with when(T.And(T.And(held, first), other <= row)):
                tile[0] = tile[0] + 1
            with when(expert <= own):
                end[0] = end[0] + 1
        is_first = T.Or(row == 0, self.sorted_expert[T.max(row - 1, T.int32(0))] != own)
        with when(T.And(is_first, own < self.problem.up.num_experts)):
            self.tile_expert.store(tile[0], own)
            self.tile_row.store(tile[0], row)
            self.tile_end.store(tile[0], end[0])
        with when(row == self.slots - 1):
            self.num_tiles.store(0, tile[0] + 1)

    def _gemms(self) -> tuple[MmaGemm, MmaGemm]:
        p, made = self.problem, []
        ends = ({"x": self.x, "y": self.h}, {"x": self.h, "y": self.part})
        for gemm, tile, stack, own in zip((p.up, p.down), self.tiles, self.stacks, ends, strict=True):
            named = dict(zip(("w", "w_scale", "bias"), stack, strict=True)) | own | {"slot_order": self.order}
            operands = _Own(gemm, tile.splits, named, self.slots)
            made.append((CodesGemm if gemm.code_bits else MmaGemm)(gemm, tile, operands, self.ring))
        return made[0], made[1]

    def _each_tile(self, gemm: MmaGemm, tile: Tile) -> None:
        """Tiles of rows times blocks of columns times splits, spread over the blocks of the grid."""
        item, columns = Local(1, "int32", "item"), gemm.problem.columns // gemm.out
        item[0] = self.block
        per_tile = columns * tile.splits
        with T.While(item[0] < self.num_tiles[0] * per_tile):
            at, rest = T.Bind(item[0] // per_tile), T.Bind(item[0] % per_tile)
            rows = T.Bind(self.tile_row[at]), T.Bind(self.tile_end[at])
            split = T.Bind(rest // columns) if tile.splits > 1 else T.int32(0)
            gemm.make_tile(T.Bind(self.tile_expert[at]), rows, T.Bind(rest % columns * gemm.out), split)
            item[0] = item[0] + self.blocks
            sync()  # all warps have read the ring

    def _sum(self) -> None:
        p, chunks = self.problem, self.problem.down.columns // COLUMNS
        unit, sums, words = Local(1, "int32", "unit"), Local(COLUMNS, name="sums"), Local(COLUMNS, "uint32", "words")
        unit[0] = self.block * self.threads + self.thread
        with T.While(unit[0] < self.n * chunks):
            token, column = T.Bind(unit[0] // chunks), T.Bind(unit[0] % chunks * COLUMNS)
            sums.fill(0)
            with T.serial(self.per_token) as k:
                slot = T.Bind(token * self.per_token + k)
                with when(self.slot_expert[slot] < p.up.num_experts):
                    self._add_row(slot, column, T.Bind(self._weight(token, k)), sums, words)
            store_words(self.y.ptr_to([token, column]), [pack_bf16(sums[0], sums[1]), pack_bf16(sums[2], sums[3])])
            unit[0] = unit[0] + self.blocks * self.threads

    def _add_row(self, slot: Expr, column: Expr, weight: Expr, sums: Local, words: Local) -> None:
        row = Local(COLUMNS, name="row")
        row.fill(0)
        for s in range(self.tiles[1].splits):
            pointer = self.part.ptr_to([T.Cast("int64", slot) + T.Cast("int64", self.slots) * s, column])
            ptx("ld.global.cg.v4.b32", *[words[i] for i in range(COLUMNS)], pointer)  # another block wrote it
            for i in range(COLUMNS):
                row[i] = row[i] + T.reinterpret("float32", words[i])
        for i in range(COLUMNS):
            sums[i] = sums[i] + weight * row[i]

    def _weight(self, token: Expr, k: Expr) -> Expr:
        routed = self.weights[token, T.min(k, T.int32(self.top_k - 1))]
        shared = T.float32(1) if self.shared_weight is None else self.shared_weight[token]
        return T.if_then_else(k < self.top_k, routed, shared)


def grid_barrier(counter: Expr, target: Expr) -> Expr:
    """Counts a block in and waits until the counter is at target; what all blocks wrote before is visible after."""
    source = """
__device__ __forceinline__ int moec_acquire(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void moec_grid_barrier(int* counter, int target) {
  __threadfence();
  atomicAdd(counter, 1);
  while (moec_acquire(counter) < target) {
  }
  __threadfence();
}
"""
    return device("moec_grid_barrier", "void", source, counter, target)
