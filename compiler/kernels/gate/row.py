"""From one token's logits to its weights and experts, in registers: every GateSpec but sparsemixer (sparsemixer.py).

Scores lie in a scratch row of whole vectors, each expert group padded to whole vectors by itself, so that a group is a
range of vectors. Choosing is done on int32 keys (Simd.key) that order as GateSpec's top_k_stable does: the lowest index
wins a tie and NaN is above everything, so a NaN logit is chosen and its weight is NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tvm.tirx.script import builder as T

from moec.compiler.kernels.gate.problem import GateProblem
from moec.compiler.kernels.simd import Expr, Registers, Simd, for_chunks

TAKEN = -(2**31)  # below the key of every value, -inf included

At = Callable[[Expr], Expr]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How E experts of G groups lie in vectors. vectors: of one group."""

    lanes: int
    num_groups: int
    group_size: int

    @property
    def vectors(self) -> int:
        """Of one group; the last may be filled in part."""
        return -(-self.group_size // self.lanes)

    @property
    def padded(self) -> int:
        """Places of one group."""
        return self.vectors * self.lanes

    @property
    def total(self) -> int:
        """Vectors of all groups."""
        return self.vectors * self.num_groups

    def place(self, group: Expr, inner: Expr) -> Expr:
        """Where the inner-th expert of a group lies."""
        return group * self.padded + inner

    def expert(self, place: Expr) -> Expr:
        """The inverse: which expert lies in a place that is not padding."""
        if self.num_groups == 1:
            return place
        return place // self.padded * self.group_size + place % self.padded


class Row:
    """The emitter of one row: the vector unit, the problem, and where experts lie."""

    def __init__(self, v: Simd, problem: GateProblem) -> None:
        self.v, self.problem, self.spec = v, problem, problem.gate
        groups = self.spec.num_groups
        self.layout = Layout(v.lanes, groups, problem.num_experts // groups)

    def rounded(self, value: Expr, n: int = 0) -> Expr:
        """Rounds to the dtype in which scores are computed."""
        return self.v.rounded(value, self.problem.compute_dtype, n or self.v.lanes)

    def splat(self, value: Expr) -> Expr:
        """A value in every lane of a vector."""
        return self.v.splat(value, self.v.lanes)

    def each(self, body: Callable[[Expr], None]) -> None:
        """body(i) for every vector of the row, unrolled where there are few."""
        if self.layout.total <= 8:
            for i in range(self.layout.total):
                body(i)
        else:
            with T.serial(self.layout.total) as i:
                body(i)

    def inside(self, i: Expr, value: Expr, fill: float) -> Expr:
        """value of vector i, `fill` in the lanes past the group's end."""
        last = self.layout.group_size - (self.layout.vectors - 1) * self.v.lanes
        if last == self.v.lanes:
            return value
        lane = T.ramp(0, 1, self.v.lanes) + T.broadcast(i % self.layout.vectors * self.v.lanes, self.v.lanes)
        return T.Select(lane < T.broadcast(self.layout.group_size, self.v.lanes), value, self.splat(T.float32(fill)))

    def read(self, source: At, dtype: str, into: Registers) -> None:
        """A row of E values of the caller's into the padded layout, rounded to the scores' dtype."""
        with T.serial(self.layout.num_groups) as g:

            def take(at: Expr, n: int, _: int) -> None:
                value = self.rounded(self.v.load(source(g * self.layout.group_size + at), dtype, n), n)
                into.set_range(self.layout.place(g, at), n, value)

            for_chunks(self.layout.group_size, self.v.lanes, 1, take)

    def total(self, term: Callable[[Expr], Expr]) -> Expr:
        """The sum over the row of term(i), lanes past a group's end left out."""
        acc = Registers(1, self.v.lanes)
        acc.fill(0.0)

        def add(i: Expr) -> None:
            acc[0] = acc[0] + self.inside(i, term(i), 0.0)

        self.each(add)
        return self.v.reduce("sum", acc[0], self.v.lanes)

    def transform(self, logits: Registers) -> None:
        """GateSpec.transform in place."""
        kind, param = self.spec.transform, T.float32(self.spec.transform_param)
        count = self.problem.num_experts
        if kind == "std":
            mean = T.Bind(self.total(lambda i: logits[i]) / T.float32(count))

            def square(i: Expr) -> Expr:
                d = T.Bind(logits[i] - self.splat(mean))
                return d * d

            variance = T.Bind(self.total(square) / T.float32(count - 1))
            std = self.rounded(T.Bind(self.rounded(T.sqrt(variance), 1) + param), 1)
            centre = self.rounded(mean, 1)

        def one(i: Expr) -> None:
            if kind == "std":
                x = self.rounded(logits[i] - self.splat(centre)) / self.splat(std)
            else:
                x = logits[i] / self.splat(param)
            x = self.rounded(x)
            if kind == "tanh_cap":
                x = self.rounded(self.rounded(self.v.call("tanh", x, self.v.lanes)) * self.splat(param))
            logits[i] = x

        if kind != "none":
            self.each(one)

    def score(self, values: Registers) -> None:
        """The score function over the whole row, in place."""
        if self.spec.score == "softmax":
            top = self.splat(self.maximum(values))
            self.each(lambda i: _put(values, i, self.v.call("exp", values[i] - top, self.v.lanes)))
            total = self.splat(T.Bind(self.total(lambda i: values[i])))
            self.each(lambda i: _put(values, i, self.rounded(values[i] / total)))
        elif self.spec.score == "sigmoid":
            self.each(lambda i: _put(values, i, self.rounded(self.v.call("sigmoid", values[i], self.v.lanes))))

    def maximum(self, values: Registers) -> Expr:
        """The largest value of the row; NaN where there is one."""
        best = Registers(1, self.v.lanes, "int32")
        best.fill(TAKEN)

        def one(i: Expr) -> None:
            best[0] = T.max(best[0], self.v.key(self.inside(i, values[i], float("-inf")), self.v.lanes))

        self.each(one)
        return self.v.unkey(self.v.reduce_key(best[0], self.v.lanes), 1)

    def key_row(self, values: Registers, keys: Registers) -> None:
        """keys of values; TAKEN past a group's end."""

        def one(i: Expr) -> None:
            lanes = self.v.lanes
            key = self.v.key(values[i], lanes)
            if self.layout.group_size % lanes:
                lane = T.ramp(0, 1, lanes) + T.broadcast(i % self.layout.vectors * lanes, lanes)
                inside = lane < T.broadcast(self.layout.group_size, lanes)
                key = T.Select(inside, key, T.broadcast(T.int32(TAKEN), lanes))
            keys[i] = key

        self.each(one)

    def best(self, keys: Registers, first: Expr, count: int) -> tuple[Expr, Expr]:
        """The greatest key among `count` vectors from vector `first` on -> (key, its lowest place in the row)."""
        lanes = self.v.lanes
        top, places = Registers(1, lanes, "int32"), Registers(1, lanes, "int32")
        top.fill(TAKEN)
        places.fill(0)

        def one(i: Expr) -> None:
            key = T.Bind(keys[first + i])
            place = T.ramp(0, 1, lanes) + T.broadcast((first + i) * lanes, lanes)
            places[0] = T.Select(key > top[0], place, places[0])
            top[0] = T.max(top[0], key)

        if count <= 8:
            for i in range(count):
                one(i)
        else:
            with T.serial(count) as i:
                one(i)
        key = self.v.reduce_key(top[0], lanes)
        return key, self.v.first_place(top[0], places[0], key, lanes)


def _put(row: Registers, i: Expr, value: Expr) -> None:
    row[i] = value
