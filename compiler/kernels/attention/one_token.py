"""A task of attention whose rows are of one token, as in decoding: keys and values go through registers, not scratch.

A few rows use what is read once, so writing it down first costs more than it saves. Scores are of some keys with all
query heads of a group at a time, as many as there are lanes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from tvm.tirx.script import builder as T

from moec.compiler.kernels.attention.block import ACCUMULATORS, BLOCK, Block
from moec.compiler.kernels.attention.problem import CACHE_BYTES, AttentionProblem
from moec.compiler.kernels.simd import Expr, Registers, Simd


def takes(v: Simd, problem: AttentionProblem) -> bool:
    """Whether rows are whole vectors of numbers, and a group's heads fit into one."""
    whole = problem.head_dim % v.lanes == 0 and problem.value_dim % v.lanes == 0
    return whole and problem.group <= v.lanes


class OneToken:
    """The emitter of one token; it uses the queries, totals and softmax of a block."""

    def __init__(self, block: Block) -> None:
        self.block, self.v, self.problem, self.tensors = block, block.v, block.problem, block.tensors
        self.group, lanes = block.problem.group, block.v.lanes
        self.keys_together = 1 << (lanes // self.group).bit_length() - 1
        self.products = Registers(self.group * BLOCK // lanes, lanes)  # [query head of the group][key]
        self.weights = Registers(self.group * BLOCK // lanes, lanes)
        self.decays = Registers(self.group, 1)
        self.sums = Registers(lanes, lanes)  # of products of a query head and a key, [lane of the scores][lane]

    def run(self, token: Expr, head: Expr) -> None:
        """Attention of a token for a kv head. Row of scratch: the query head of the group."""
        v, x, block = self.v, self.tensors, self.block
        slot, position = T.Bind(x.slots[token]), T.Bind(x.positions[token])
        first = v.opaque(block.first_key(position))

        def each_row(body: Callable[[Expr, Expr, Expr], None]) -> None:
            with T.serial(T.int64(self.group)) as i:
                row = v.opaque(i)
                body(row, token, v.opaque(head * self.group + row))

        each_row(block.start_row)
        with T.serial((position - first + BLOCK) // BLOCK) as b:
            low = v.opaque(first + b * BLOCK)
            count = v.opaque(T.min(position + 1 - low, BLOCK))
            self._multiply(slot, low, count, head)
            each_row(lambda row, *_: self._weigh(row, low, count, (first, position)))
            self._accumulate(slot, low, count, head)
        each_row(block.finish_row)

    def _multiply(self, slot: Expr, low: Expr, count: Expr, head: Expr) -> None:
        """Scores before their cap: the queries with keys [low, low + count)."""
        v, lanes, block, together = self.v, self.v.lanes, self.block, self.keys_together
        cache, scales, dtype = self.tensors.k_cache, self.tensors.k_scales, self.problem.cache_dtype
        with T.serial((count + together - 1) // together) as k:
            start = v.opaque(k * together)
            self.sums.fill(0.0)
            with T.serial(v.opaque(T.min(count - start, together))) as j:
                key = v.opaque(low + start + j)
                self._prefetch(cache, (slot, key + BLOCK, head), range(block.key_vectors))
                acc = Registers(self.group, lanes)
                acc.fill(0.0)
                for d in range(block.key_vectors):
                    numbers = v.load(cache[slot, key, head, d * lanes], dtype, lanes)
                    for g in range(self.group):
                        acc[g] = acc[g] + block.queries[g * block.key_vectors + d] * numbers
                for g in range(self.group):
                    self.sums[g * together + j] = (
                        acc[g] if scales is None else acc[g] * v.splat(scales[slot, key, head], lanes)
                    )
            self._put(start, v.transpose_sum([self.sums[i] for i in range(lanes)]))

    def _put(self, start: Expr, scores: Expr) -> None:
        """scores [query head][key] of keys from `start` on, into products."""
        if self.group == 1:
            self.products.set_range(start, self.v.lanes, scores)
            return
        one = Registers(1, self.v.lanes)
        one[0] = scores
        for g, j in itertools.product(range(self.group), range(self.keys_together)):
            self.products.set_element(g * BLOCK + start + j, one.element(g * self.keys_together + j))

    def _weigh(self, row: Expr, low: Expr, count: Expr, seen: tuple[Expr, Expr]) -> None:
        """The weights of the keys for a row."""
        parts = BLOCK // self.v.lanes
        self.decays[row] = self.block.weigh(row, count, lambda part: self.products[row * parts + part], (low, *seen))
        for part in range(parts):
            self.weights[row * parts + part] = self.block.scores[part]

    def _accumulate(self, slot: Expr, low: Expr, count: Expr, head: Expr) -> None:
        """totals = totals * decay + weights @ values."""
        v, lanes, block = self.v, self.v.lanes, self.block
        cache, scales, dtype = self.tensors.v_cache, self.tensors.v_scales, self.problem.cache_dtype
        size = max(1, ACCUMULATORS // self.group)
        for start in range(0, block.value_vectors, size):
            vectors = range(start, min(start + size, block.value_vectors))
            acc = [Registers(len(vectors), lanes) for _ in range(self.group)]
            for g, sums in enumerate(acc):
                decay = v.splat(T.Bind(self.decays[g]), lanes)
                for i, u in enumerate(vectors):
                    sums[i] = block.totals[g * block.value_vectors + u] * decay
            with T.serial(count) as j:
                key = v.opaque(low + j)
                self._prefetch(cache, (slot, key + BLOCK, head), vectors)
                values = [v.load(cache[slot, key, head, u * lanes], dtype, lanes) for u in vectors]
                scale = None if scales is None else T.Bind(scales[slot, key, head])
                for g, sums in enumerate(acc):
                    weight = self.weights.element(g * BLOCK + j)
                    weight = v.splat(T.Bind(weight if scale is None else weight * scale), lanes)
                    for i, numbers in enumerate(values):
                        sums[i] = sums[i] + weight * numbers
            for g, sums in enumerate(acc):
                for i, u in enumerate(vectors):
                    block.totals[g * block.value_vectors + u] = sums[i]

    def _prefetch(self, cache: Expr, row: tuple[Expr, Expr, Expr], vectors: range) -> None:
        """Asks for the lines of some vectors of a row of a cache."""
        lanes = self.v.lanes
        line = 64 // CACHE_BYTES[self.problem.cache_dtype]
        for at in range(vectors[0] * lanes, (vectors[-1] + 1) * lanes, line):
            self.v.prefetch(cache[(*row, at)])
