"""moec::dispatch with the tile map of the grouped GEMMs: a stable counting sort of the slots by expert.

One launch of `place` where there are at most CHUNK slots, else `count` and then `place`:
    count(experts, counts)                                            counts i32[chunks, bins]
    place(experts, counts, slot_order, expert_start, tile_expert, tile_row)
slot_order and expert_start are moec::dispatch's; slots whose expert is not held here (index >= E) stand behind all
others. tile_expert, tile_row i32[tiles]: the rows that a block of a GEMM works on, and its expert; -1: nothing to do.
The result does not depend on the order in which blocks or warps run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.cuda.emit import (
    WARP,
    Expr,
    Local,
    count_bits,
    define,
    same_lanes,
    shuffle_up,
    size,
    sync,
    tensor,
    warp_sync,
    when,
)

WARPS, ROUNDS = 8, 4
THREADS = WARPS * WARP
CHUNK = THREADS * ROUNDS  # slots of one block
MAX_BINS = 2048


@dataclasses.dataclass(frozen=True)
class DispatchProblem:
    """num_experts: routed. num_shared: experts after them that see every token. tile_rows: rows of a GEMM's block."""

    num_experts: int
    top_k: int
    num_shared: int = 0
    tile_rows: int = 16

    @property
    def slots_per_token(self) -> int:
        """Routed and shared ones."""
        return self.top_k + self.num_shared

    @property
    def stacked(self) -> int:
        """Experts in a stack of weights: routed, then shared."""
        return self.num_experts + self.num_shared

    @property
    def bins(self) -> int:
        """The experts and, last, those held elsewhere."""
        return self.stacked + 1

    def chunks(self, num_tokens: int) -> int:
        """Blocks of CHUNK slots that so many tokens fill."""
        return -(-num_tokens * self.slots_per_token // CHUNK)

    def tiles(self, num_tokens: int) -> int:
        """An upper bound of the blocks of rows, whatever the routing: the grid of a launch that may be replayed."""
        slots = num_tokens * self.slots_per_token
        return min(slots, slots // self.tile_rows + self.stacked)


def refusal(problem: DispatchProblem) -> str | None:
    """Why the kernel does not take the problem, or None."""
    if problem.bins > MAX_BINS:
        return f"{problem.stacked} experts, at most {MAX_BINS - 1}"
    return None


class _Chunk:
    """The emitter of one block: its slots, and counters [WARPS, bins] in shared memory at `shared`."""

    def __init__(self, problem: DispatchProblem, experts: Any, num_tokens: Expr, chunk: Expr, shared: Any) -> None:
        self.problem, self.experts, self.chunk, self.shared = problem, experts, chunk, shared
        self.thread = T.thread_id([THREADS])
        self.warp, self.lane = self.thread // WARP, self.thread % WARP
        self.num_slots = num_tokens * problem.slots_per_token
        self.expert = Local(ROUNDS, "int32", name="expert")

    def slot(self, r: int) -> Expr:
        return self.chunk * CHUNK + self.warp * (ROUNDS * WARP) + r * WARP + self.lane

    def read(self) -> None:
        """The bin of each of the thread's slots, -1 past the end."""
        p = self.problem
        for r in range(ROUNDS):
            slot = T.Bind(self.slot(r))
            self.expert[r] = T.int32(-1)
            with when(slot < self.num_slots):
                k = slot % p.slots_per_token
                self.expert[r] = k - p.top_k + p.num_experts
                with when(k < p.top_k):
                    raw = T.Bind(self.experts[slot // p.slots_per_token, k])
                    held = T.And(raw >= 0, raw < p.num_experts)
                    self.expert[r] = T.Select(held, raw, T.int32(p.stacked))

    def each_bin(self, body: Any) -> None:
        """body(bin) for every bin, spread over the threads."""
        with T.serial(-(-self.problem.bins // THREADS)) as i:
            b = T.Bind(i * THREADS + self.thread)
            with when(b < self.problem.bins):
                body(b)

    def zero(self) -> None:
        with T.serial(-(-self.problem.bins * WARPS // THREADS)) as i:
            at = T.Bind(i * THREADS + self.thread)
            with when(at < self.problem.bins * WARPS):
                T.buffer_store(self.shared, T.int32(0), [at])
        sync()

    def rounds(self, place: Any | None) -> None:
        """Adds each slot to its warp's counter; place(position, slot) gets the counter's value before."""
        for r in range(ROUNDS):
            expert = self.expert[r]
            same = T.Bind(same_lanes(expert))
            below = T.bitwise_and(same, T.shift_left(T.uint32(1), T.Cast("uint32", self.lane)) - T.uint32(1))
            rank = T.Bind(count_bits(below))
            counter = T.Bind(self.warp * self.problem.bins + expert)
            if place is not None:
                with when(expert >= 0):
                    place(self.shared[counter] + rank, self.slot(r))
                warp_sync()
            with when(T.And(rank == 0, expert >= 0)):
                T.buffer_store(self.shared, self.shared[counter] + count_bits(same), [counter])
            warp_sync()


def build_count(problem: DispatchProblem) -> Any:
    """counts[chunk, bin]: how many slots of a chunk each bin gets."""

    def body() -> None:
        n, chunks = size("n"), size("chunks")
        experts = tensor("experts", (n, problem.top_k), "int32")
        counts = tensor("counts", (chunks, problem.bins), "int32")
        T.device_entry()
        chunk = T.cta_id([chunks])
        shared = T.alloc_buffer((WARPS * problem.bins,), "int32", scope="shared.dyn", align=16)
        block = _Chunk(problem, experts, n, chunk, shared)
        block.read()
        block.zero()
        block.rounds(None)
        sync()

        def write(b: Expr) -> None:
            total = shared[b]
            for w in range(1, WARPS):
                total = total + shared[w * problem.bins + b]
            T.buffer_store(counts, total, [chunk, b])

        block.each_bin(write)

    return define(body)


def build_place(problem: DispatchProblem, one_chunk: bool) -> Any:
    """The whole dispatch, or (one_chunk False) what follows `count`."""
    bins = problem.bins
    start_at, tile_at = WARPS * bins, (WARPS + 1) * bins  # where totals, later starts, lie in shared memory

    def body() -> None:
        n, chunks, tiles = size("n"), size("chunks"), size("tiles")
        experts = tensor("experts", (n, problem.top_k), "int32")
        counts = None if one_chunk else tensor("counts", (chunks, bins), "int32")
        slot_order = tensor("slot_order", (n * problem.slots_per_token,), "int32")
        expert_start = tensor("expert_start", (bins,), "int32")
        tile_expert, tile_row = tensor("tile_expert", (tiles,), "int32"), tensor("tile_row", (tiles,), "int32")
        T.device_entry()
        chunk = T.cta_id([1 if one_chunk else chunks])
        shared = T.alloc_buffer(((WARPS + 2) * bins + 1,), "int32", scope="shared.dyn", align=16)
        block = _Chunk(problem, experts, n, chunk, shared)
        prior = Local(-(-bins // THREADS), "int32", name="prior")
        block.read()
        block.zero()
        block.rounds(None)
        sync()
        for i in range(prior.size):
            b = T.Bind(i * THREADS + block.thread)
            with when(b < bins):
                _totals(shared, counts, chunk, chunks, bins, b, prior, i, start_at)
        sync()
        with when(block.warp == 0):
            _scan(problem, shared, block.lane, start_at, tile_at)
        sync()
        for i in range(prior.size):
            b = T.Bind(i * THREADS + block.thread)
            with when(b < bins):
                _warp_starts(shared, bins, b, prior, i, start_at)
        sync()
        block.rounds(lambda position, slot: T.buffer_store(slot_order, slot, [position]))
        with when(chunk == 0):
            block.each_bin(lambda b: T.buffer_store(expert_start, shared[start_at + b], [b]))
        grid = 1 if one_chunk else chunks
        _tile_map(
            problem, shared, start_at, tile_at, tile_expert, tile_row, tiles, chunk * THREADS + block.thread, grid
        )

    return define(body)


def _totals(
    shared: Any, counts: Any, chunk: Expr, chunks: Expr, bins: int, b: Expr, prior: Local, i: int, start_at: int
) -> None:
    """The slots of bin b in all chunks into shared memory, those of earlier chunks into prior[i]."""
    total = Local(1, "int32")
    total[0], prior[i] = T.int32(0), T.int32(0)
    if counts is None:
        for w in range(WARPS):
            total[0] = total[0] + shared[w * bins + b]
    else:
        with T.serial(chunks) as c:
            with when(c == chunk):
                prior[i] = total[0]
            total[0] = total[0] + counts[c, b]
    T.buffer_store(shared, total[0], [start_at + b])


def _scan(problem: DispatchProblem, shared: Any, lane: Expr, start_at: int, tile_at: int) -> None:
    """By one warp: totals become starts; at tile_at, the first tile of each bin and, last, the number of tiles."""
    carry = Local(2, "int32", name="carry")
    carry.fill(0)
    value, sums = Local(2, "int32"), Local(2, "int32")
    with T.serial(-(-problem.bins // WARP)) as i:
        b = T.Bind(i * WARP + lane)
        value.fill(0)
        with when(b < problem.bins):
            value[0] = shared[start_at + b]
            held = b < problem.stacked
            value[1] = T.Select(held, (value[0] + (problem.tile_rows - 1)) // problem.tile_rows, T.int32(0))
        for j in range(2):
            sums[j] = value[j]
            for step in (1, 2, 4, 8, 16):
                below = T.Bind(shuffle_up(sums[j], step))
                with when(lane >= step):
                    sums[j] = sums[j] + below
        with when(b < problem.bins):
            T.buffer_store(shared, carry[0] + sums[0] - value[0], [start_at + b])
            T.buffer_store(shared, carry[1] + sums[1] - value[1], [tile_at + b])
        for j in range(2):
            last = T.tvm_warp_shuffle(T.uint32(0xFFFFFFFF), sums[j], WARP - 1, WARP, WARP)
            carry[j] = carry[j] + last
    with when(lane == 0):
        T.buffer_store(shared, carry[1], [tile_at + problem.bins])


def _warp_starts(shared: Any, bins: int, b: Expr, prior: Local, i: int, start_at: int) -> None:
    """The counters of bin b become the positions at which each warp's slots begin."""
    running = Local(1, "int32")
    running[0] = shared[start_at + b] + prior[i]
    for w in range(WARPS):
        count = T.Bind(shared[w * bins + b])
        T.buffer_store(shared, running[0], [w * bins + b])
        running[0] = running[0] + count


def _tile_map(
    problem: DispatchProblem, shared: Any, start_at: int, tile_at: int, tile_expert: Any, tile_row: Any, tiles: Expr,
    first: Expr, grid: Expr,
) -> None:  # fmt: skip
    """Each thread finds the expert of its tiles by bisection."""
    bounds, at = Local(2, "int32", name="bounds"), Local(2, "int32", name="at")
    at[0] = first
    with T.While(at[0] < tiles):
        at[1] = T.int32(-1)
        bounds[0] = T.int32(-1)
        with when(at[0] < shared[tile_at + problem.bins]):
            bounds[0], bounds[1] = T.int32(0), T.int32(problem.bins)
            with T.While(bounds[1] - bounds[0] > 1):
                middle = T.Bind((bounds[0] + bounds[1]) // 2)
                with T.If(shared[tile_at + middle] <= at[0]):
                    with T.Then():
                        bounds[0] = middle
                    with T.Else():
                        bounds[1] = middle
            at[1] = shared[start_at + bounds[0]] + (at[0] - shared[tile_at + bounds[0]]) * problem.tile_rows
        T.buffer_store(tile_expert, bounds[0], [at[0]])
        T.buffer_store(tile_row, at[1], [at[0]])
        at[0] = at[0] + grid * THREADS
