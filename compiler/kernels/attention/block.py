"""One task of attention: the query rows of a run of tokens of one sequence and one kv head against its caches.

Rows are (token, query head of the group). Keys are taken BLOCK at a time: widened to float32 into scratch
once, used by every row, with the online softmax in float32 (running maximum, sum and output per row). A query sees a
contiguous range of keys [first, position], which is what causal order, sliding windows and chunks all come to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.attention.problem import CACHE_BYTES, AttentionProblem
from moec.compiler.kernels.simd import Expr, Registers, Simd, Sums, for_chunks

BLOCK = 32  # keys per step: two vectors of scores, and K and V of a step fit into the first-level cache
ROWS = 64  # query rows of a task at most, unless one token alone has more
LOWEST = -1e30  # below every score, finite: a row with no visible key yet must not give inf - inf
ACCUMULATORS = 8  # output vectors held in registers


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The kernel's arguments, see cached_attention.py."""

    q: Any
    k_cache: Any
    v_cache: Any
    k_scales: Any
    v_scales: Any
    slots: Any
    positions: Any
    sinks: Any
    out: Any
    scale: Expr
    window: Expr
    chunk: Expr
    softcap: Expr


def tokens_per_task(problem: AttentionProblem) -> int:
    """How many tokens a task may take."""
    return max(1, ROWS // problem.group)


class Block:
    """The emitter of one task and its scratch."""

    def __init__(self, v: Simd, problem: AttentionProblem, tensors: Tensors) -> None:
        self.v, self.problem, self.tensors = v, problem, tensors
        self.rows = tokens_per_task(problem) * problem.group
        self.key_vectors = -(-problem.head_dim // v.lanes)
        self.value_vectors = -(-problem.value_dim // v.lanes)
        lanes = v.lanes
        self.queries = Registers(self.rows * self.key_vectors, lanes)
        self.keys = Registers(BLOCK * self.key_vectors, lanes)
        self.values = Registers(BLOCK * self.value_vectors, lanes)
        self.scores = Registers(BLOCK // lanes, lanes)
        self.totals = Registers(self.rows * self.value_vectors, lanes)
        self.maxima, self.sums = Registers(self.rows, 1), Registers(self.rows, 1)
        self.bounds = Registers(2, 1, "int64")  # keys that some row of the run sees
        # in memory, because TVM would simplify max(chunk, 1) to chunk behind `chunk > 0` and still divide by 0
        self.divisor = Registers(1, 1, "int64")
        self.divisor[0] = T.max(tensors.chunk, T.int64(1))

    def first_key(self, position: Expr) -> Expr:
        """The first key that a query at a position sees."""
        window, chunk = self.tensors.window, self.tensors.chunk
        by_window = T.Select(window > 0, T.max(position - window + 1, 0), T.int64(0))
        by_chunk = T.Select(chunk > 0, position - position % self.divisor[0], T.int64(0))
        return T.Bind(T.max(by_window, by_chunk))

    def run(self, start: Expr, end: Expr, head: Expr) -> None:
        """Attention of tokens [start, end), all of one sequence, for a kv head."""
        group = self.problem.group
        slot = T.Bind(self.tensors.slots[start])
        num_rows = self.v.opaque((end - start) * group)
        self._bound(start, end)

        def each_row(body: Callable[[Expr, Expr, Expr], None]) -> None:
            """body(row, token, query head)."""
            with T.serial(num_rows) as i:
                row = self.v.opaque(i)
                body(row, self.v.opaque(start + row // group), self.v.opaque(head * group + row % group))

        each_row(self.start_row)
        first = T.Bind(self.bounds[0])
        with T.serial((self.bounds[1] - first + BLOCK - 1) // BLOCK) as b:
            low = self.v.opaque(first + b * BLOCK)
            count = self.v.opaque(T.min(self.bounds[1] - low, BLOCK))
            self._read(slot, low, count, head)
            each_row(lambda row, token, _: self._step_if_seen(row, token, low, count))
        each_row(self.finish_row)

    def _read(self, slot: Expr, low: Expr, count: Expr, head: Expr) -> None:
        """Keys [low, low + count) and their values into scratch."""
        x, problem = self.tensors, self.problem
        self._fill(self.keys, (x.k_cache, x.k_scales), problem.head_dim, (slot, low, count, head))
        # what memory held before may be subnormal, which the processor multiplies a hundred times slower
        with T.serial((BLOCK - count) * self.key_vectors) as i:
            self.keys[count * self.key_vectors + i] = self.v.splat(T.float32(0), self.v.lanes)
        self._fill(self.values, (x.v_cache, x.v_scales), problem.value_dim, (slot, low, count, head))

    def _step_if_seen(self, row: Expr, token: Expr, low: Expr, count: Expr) -> None:
        position = T.Bind(self.tensors.positions[token])
        since = self.first_key(position)
        with T.If(T.And(low <= position, low + BLOCK > since)), T.Then():
            self._step(row, low, count, since, position)

    def _bound(self, start: Expr, end: Expr) -> None:
        self.bounds[0] = T.int64(2**62)
        self.bounds[1] = T.int64(0)
        with T.serial(end - start) as i:
            position = T.Bind(self.tensors.positions[start + i])
            self.bounds[0] = T.min(self.bounds[0], self.first_key(position))
            self.bounds[1] = T.max(self.bounds[1], position + 1)

    def start_row(self, r: Expr, token: Expr, head: Expr) -> None:
        """The scaled query, zero past its width, and the softmax state."""
        v, problem, x = self.v, self.problem, self.tensors
        if problem.head_dim % v.lanes:
            self.queries[r * self.key_vectors + self.key_vectors - 1] = v.splat(T.float32(0), v.lanes)

        def take(at: Expr, n: int, _: int) -> None:
            value = v.load(x.q[token, head, at], problem.dtype, n) * v.splat(x.scale, n)
            self.queries.set_range(r * self.key_vectors * v.lanes + at, n, value)

        for_chunks(problem.head_dim, v.lanes, 1, take)
        for u in range(self.value_vectors):
            self.totals[r * self.value_vectors + u] = v.splat(T.float32(0), v.lanes)
        if problem.sinks_dtype is None:
            self.maxima[r] = T.float32(LOWEST)
            self.sums[r] = T.float32(0)
        else:
            self.maxima[r] = v.load(x.sinks[head], problem.sinks_dtype, 1)
            self.sums[r] = T.float32(1)

    def _fill(self, into: Registers, stored: tuple[Any, Any], width: int, where: tuple[Expr, Expr, Expr, Expr]) -> None:
        """Rows of the cache into float32 scratch, asking for the next block's lines on the way."""
        v, dtype, (cache, scales) = self.v, self.problem.cache_dtype, stored
        slot, low, count, kv_head = where
        padded = -(-width // v.lanes) * v.lanes
        line = 64 // CACHE_BYTES[dtype]
        with T.serial(count) as j:
            key = T.Bind(low + j)
            for at in range(0, width, line):
                v.prefetch(cache[slot, key + BLOCK, kv_head, at])
            if width % v.lanes:
                into.set_range(j * padded + padded - v.lanes, v.lanes, v.splat(T.float32(0), v.lanes))

            scale = None if scales is None else T.Bind(scales[slot, key, kv_head])

            def take(at: Expr, n: int, _: int) -> None:
                value = v.load(cache[slot, key, kv_head, at], dtype, n)
                into.set_range(j * padded + at, n, value if scale is None else value * v.splat(scale, n))

            unrolled_chunks(width, v.lanes, take)

    def _step(self, r: Expr, low: Expr, count: Expr, since: Expr, position: Expr) -> None:
        """One row against the keys in scratch."""
        decay = self.weigh(r, count, lambda part: self._scores(r, part), (low, since, position))
        self._accumulate(r, count, decay)

    def weigh(self, r: Expr, count: Expr, products: Callable[[int], Expr], seen: tuple[Expr, Expr, Expr]) -> Expr:
        """Leaves the weights of a row's next keys in `scores`. -> what its totals so far are to be multiplied with.

        products: of the query and `lanes` keys. seen: the first key's place; of the keys that the row sees, the first
        and the last.
        """
        v, lanes = self.v, self.v.lanes
        for part in range(BLOCK // lanes):
            self.scores[part] = v.splat(T.float32(float("-inf")), lanes)
            with T.If(count > part * lanes), T.Then():
                self.scores[part] = self._visible(products(part), part, *seen)
        best = Registers(1, lanes)
        best[0] = self.scores[0]
        for part in range(1, BLOCK // lanes):
            best[0] = T.max(best[0], self.scores[part])
        old = T.Bind(self.maxima[r])
        new = T.Bind(T.max(old, v.reduce("max", best[0], lanes)))
        self.maxima[r] = new
        decay = v.call("exp", old - new, 1)
        total = Registers(1, lanes)
        total.fill(0.0)
        for part in range(BLOCK // lanes):
            weight = v.call("exp", self.scores[part] - v.splat(new, lanes), lanes)
            self.scores[part] = weight
            total[0] = total[0] + weight
        self.sums[r] = self.sums[r] * decay + v.reduce("sum", total[0], lanes)
        return decay

    def _visible(self, score: Expr, part: int, low: Expr, since: Expr, position: Expr) -> Expr:
        """Capped scores of one row with `lanes` keys, -inf for keys that it does not see."""
        v, lanes = self.v, self.v.lanes
        if self.problem.softcap:
            cap = v.splat(self.tensors.softcap, lanes)
            score = T.Bind(v.call("tanh", T.Bind(score / cap), lanes) * cap)
        key = T.Cast(f"int64x{lanes}", T.ramp(part * lanes, 1, lanes)) + T.broadcast(low, lanes)
        seen = T.And(key >= T.broadcast(since, lanes), key <= T.broadcast(position, lanes))
        return T.Select(seen, score, v.splat(T.float32(float("-inf")), lanes))

    def _scores(self, r: Expr, part: int) -> Expr:
        """q . k of one row with `lanes` keys."""
        v, lanes = self.v, self.v.lanes
        sums = Sums(lanes, lanes)
        sums.fill(0.0)
        with T.serial(self.key_vectors) as d:
            query = T.Bind(self.queries[r * self.key_vectors + d])
            for j in range(lanes):
                sums[j] = sums[j] + query * self.keys[(part * lanes + j) * self.key_vectors + d]
        return v.transpose_sum([sums[j] for j in range(lanes)])

    def _accumulate(self, r: Expr, count: Expr, decay: Expr) -> None:
        """totals[r] = totals[r] * decay + weights @ values."""
        v, lanes = self.v, self.v.lanes
        for start in range(0, self.value_vectors, ACCUMULATORS):
            vectors = range(start, min(start + ACCUMULATORS, self.value_vectors))
            acc = Registers(len(vectors), lanes)
            for i, u in enumerate(vectors):
                acc[i] = self.totals[r * self.value_vectors + u] * v.splat(decay, lanes)
            with T.serial(count) as j:
                weight = v.splat(T.Bind(self.scores.element(j)), lanes)
                for i, u in enumerate(vectors):
                    acc[i] = acc[i] + weight * self.values[j * self.value_vectors + u]
            for i, u in enumerate(vectors):
                self.totals[r * self.value_vectors + u] = acc[i]

    def finish_row(self, r: Expr, token: Expr, head: Expr) -> None:
        """The totals over the sum of their weights, into the result."""
        v, problem = self.v, self.problem
        inverse = T.Bind(T.float32(1) / self.sums[r])

        def put(at: Expr, n: int, _: int) -> None:
            value = self.totals.range(r * self.value_vectors * v.lanes + at, n) * v.splat(inverse, n)
            v.store(self.tensors.out[token, head, at], value, problem.dtype, n)

        for_chunks(problem.value_dim, v.lanes, 1, put)


def unrolled_chunks(length: int, lanes: int, body: Callable[[Expr, int, int], None]) -> None:
    """for_chunks with vectors unrolled, for rows that are a few vectors long."""
    for at in range(0, length - lanes + 1, lanes):
        body(at, lanes, 0)
    if length % lanes:
        with T.serial(length % lanes) as b:
            body(length // lanes * lanes + b, 1, 0)
