"""moec::gate: one warp per token, scores in registers, every GateSpec.

Call: kernel(logits, weights, experts), with selection_bias where the spec uses one. Expert e lies in lane e % 32.
Choosing is done on int32 keys that order as GateSpec's top_k_stable: the lowest index wins a tie, NaN is above all.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.cuda.emit import (
    WARP,
    Expr,
    Local,
    add,
    define,
    round_bf16,
    size,
    tensor,
    warp_max,
    warp_min,
    warp_read,
    warp_reduce,
    when,
)
from moec.compiler.kernels.gate.problem import GateProblem

TAKEN = -(2**31)  # below the key of every value, -inf included
NAN_KEY = 2**31 - 1
WARPS = 4
MAX_EXPERTS = 1024


def refusal(problem: GateProblem) -> str | None:
    """Why the kernel does not take the problem, or None."""
    if reason := problem.refusal():
        return reason
    if problem.num_experts > MAX_EXPERTS or problem.gate.top_k > WARP:
        return f"{problem.num_experts} experts with top {problem.gate.top_k}; at most {MAX_EXPERTS} and {WARP}"
    return "the router GEMM is not part of this kernel" if problem.hidden else None


def build(problem: GateProblem) -> Any:
    """The TIRx function."""

    def body() -> None:
        n, num_experts, top_k = size("n"), problem.num_experts, problem.gate.top_k
        logits = tensor("logits", (n, num_experts), problem.logits_dtype)
        bias = None
        if problem.gate.bias_on != "none":
            bias = tensor("selection_bias", (num_experts,), problem.selection_bias_dtype or "float32")
        weights, experts = tensor("weights", (n, top_k), "float32"), tensor("experts", (n, top_k), "int32")
        T.device_entry()
        block, warp, lane = T.cta_id([T.ceildiv(n, WARPS)]), T.warp_id([WARPS]), T.lane_id([WARP])
        token = T.Bind(block * WARPS + warp)
        with when(token < n):
            chosen_by = None if bias is None else lambda e: bias[e]
            choose(problem, lane, lambda e: logits[token, e], chosen_by, (weights, experts), token)

    return define(body)


def choose(
    problem: GateProblem,
    lane: Expr,
    logit: Callable[[Expr], Expr],
    bias: Callable[[Expr], Expr] | None,
    outputs: tuple[Any, Any],
    token: Expr,
) -> None:
    """The gate of one token by one whole warp: logit(e), bias(e) -> rows `token` of weights and experts [.., K]."""
    row = Row(problem, lane)
    row.read(row.scores, logit)
    row.transform()
    if problem.gate.score == "sparsemixer":
        row.sparsemixer()
    else:
        row.choose(bias)
    row.weigh()
    with when(lane < problem.gate.top_k):
        T.buffer_store(outputs[0], row.result(), [token, lane])
        T.buffer_store(outputs[1], row.expert[0], [token, lane])


def key_of(value: Expr) -> Expr:
    """An int32 that orders as the float does; -0 equals 0, NaN is NAN_KEY. TVM takes value != value for false."""
    bits = T.Bind(T.reinterpret("int32", value))
    ordered = T.Select(bits < 0, T.bitwise_xor(bits, T.int32(NAN_KEY)), bits)
    is_nan = T.bitwise_and(bits, T.int32(NAN_KEY)) > T.int32(0x7F800000)
    return T.Select(is_nan, T.int32(NAN_KEY), T.Select(value == T.float32(0), T.int32(0), ordered))


def _constant_key(value: float) -> int:
    bits = int(struct.unpack("<i", struct.pack("<f", value))[0]) if value else 0
    return bits if bits >= 0 else bits ^ NAN_KEY


def value_of(key: Expr) -> Expr:
    """The f32 of a key, key_of's inverse (of -0: +0)."""
    return T.reinterpret("float32", T.Select(key < 0, T.bitwise_xor(key, T.int32(NAN_KEY)), key))


class Row:
    """The emitter of one token. Lane l holds experts l, l+32, ..; what is chosen k-th lies in lane k."""

    def __init__(self, problem: GateProblem, lane: Expr) -> None:
        self.problem, self.spec, self.lane = problem, problem.gate, lane
        self.count = -(-problem.num_experts // WARP)
        self.scores, self.choice = Local(self.count, name="scores"), Local(self.count, name="choice")
        self.keys = Local(self.count, "int32", name="keys")
        self.weight, self.expert = Local(1, name="weight"), Local(1, "int32", name="expert")
        self.best, self.place = Local(1, "int32", name="best"), Local(1, "int32", name="place")
        self.sum = Local(1, name="sum")
        self.weight.fill(0)
        self.expert.fill(0)

    def rounded(self, value: Expr) -> Expr:
        """Rounds to the dtype in which scores are computed."""
        return round_bf16(value) if self.problem.compute_dtype == "bfloat16" else value

    def index(self, i: int) -> Expr:
        """The number of the lane's i-th expert; it may lie beyond the last one, see inside()."""
        return self.lane + i * WARP

    def inside(self, i: int, value: Expr, fill: Expr) -> Expr:
        """value where the lane has an expert i, else fill."""
        whole = (i + 1) * WARP <= self.problem.num_experts
        return value if whole else T.Select(self.index(i) < self.problem.num_experts, value, fill)

    def read(self, into: Local, source: Callable[[Expr], Expr]) -> None:
        """The lane's values of source(expert), rounded; -inf where there is no expert."""
        for i in range(self.count):
            if (i + 1) * WARP > self.problem.num_experts:
                into[i] = T.float32(float("-inf"))
                with when(self.index(i) < self.problem.num_experts):
                    into[i] = self.rounded(T.Cast("float32", source(self.index(i))))
            else:
                into[i] = self.rounded(T.Cast("float32", source(self.index(i))))

    def total(self, term: Callable[[int], Expr]) -> Expr:
        """The sum over all experts of term(i)."""
        self.sum[0] = T.float32(0)
        for i in range(self.count):
            self.sum[0] = self.sum[0] + self.inside(i, term(i), T.float32(0))
        warp_reduce(self.sum, 0, add)
        return T.Bind(self.sum[0])

    def transform(self) -> None:
        """GateSpec.transform in place."""
        kind, param, s = self.spec.transform, T.float32(self.spec.transform_param), self.scores
        count = self.problem.num_experts
        if kind == "std":
            mean = T.Bind(self.total(lambda i: s[i]) / T.float32(count))
            variance = T.Bind(self.total(lambda i: (s[i] - mean) * (s[i] - mean)) / T.float32(count - 1))
            std = T.Bind(self.rounded(self.rounded(T.sqrt(variance)) + param))
            centre = T.Bind(self.rounded(mean))
        for i in range(self.count):
            if kind == "std":
                s[i] = self.rounded(self.rounded(s[i] - centre) / std)
            elif kind == "temperature":
                s[i] = self.rounded(s[i] / param)
            elif kind == "tanh_cap":
                s[i] = self.rounded(self.rounded(T.tanh(self.rounded(s[i] / param))) * param)

    def key_row(self, values: Local) -> None:
        """The keys of values; TAKEN, below all of them, where there is no expert."""
        for i in range(self.count):
            self.keys[i] = self.inside(i, key_of(values[i]), T.int32(TAKEN))

    def pick(self, allowed: Callable[[int], Expr] | None = None) -> None:
        """The greatest key (of the experts where allowed(i)) into best, its lowest expert into place."""
        self.best[0], self.place[0] = T.int32(TAKEN), T.int32(NAN_KEY)
        for i in range(self.count):
            better = self.keys[i] > self.best[0]
            with when(better if allowed is None else T.And(allowed(i), better)):
                self.best[0], self.place[0] = self.keys[i], self.index(i)
        top = T.Bind(warp_max(self.best[0]))
        self.place[0] = warp_min(T.Select(self.best[0] == top, self.place[0], T.int32(NAN_KEY)))
        self.best[0] = top

    def put(self, values: Local, value: Expr) -> None:
        """values[place] = value, in the lane that holds it."""
        for i in range(self.count):
            with when(self.index(i) == self.place[0]):
                values[i] = value

    def at_place(self, values: Local) -> Expr:
        """values[place], in every lane."""
        self.sum[0] = T.float32(0)
        for i in range(self.count):
            with when(self.place[0] // WARP == i):
                self.sum[0] = values[i]
        return T.Bind(warp_read(self.sum[0], self.place[0] % WARP))

    def score(self) -> None:
        """The score function over all experts, in place."""
        s = self.scores
        if self.spec.score == "softmax":
            self.key_row(s)
            self.pick()
            top = T.Bind(value_of(self.best[0]))
            for i in range(self.count):
                s[i] = T.exp(s[i] - top)
            total = self.total(lambda i: s[i])
            for i in range(self.count):
                s[i] = self.rounded(s[i] / total)
        elif self.spec.score == "sigmoid":
            for i in range(self.count):
                s[i] = self.rounded(sigmoid(s[i]))

    def choose(self, bias: Callable[[Expr], Expr] | None) -> None:
        """The K best into expert, their scores into weight."""
        early, choice = self.spec.order == "score_then_topk", self.scores
        if bias is not None:
            choice = self.choice
            self.read(choice, bias)
        if bias is not None and self.spec.bias_on == "logits":
            self.add_scores(choice)
        if early:
            self.score()
        if bias is not None and self.spec.bias_on == "scores":
            self.add_scores(choice)
        self.key_row(choice)
        if self.spec.num_groups > 1:
            self.mask_groups()
        with T.serial(self.spec.top_k) as k:
            self.pick()
            chosen = self.at_place(self.scores)
            with when(self.lane == k):
                self.weight[0], self.expert[0] = chosen, self.place[0]
            self.put(self.keys, T.int32(TAKEN))
        if not early:
            self.score_chosen()

    def add_scores(self, choice: Local) -> None:
        """choice plus scores, rounded, in place: what experts are chosen by."""
        for i in range(self.count):
            choice[i] = self.rounded(self.scores[i] + choice[i])

    def mask_groups(self) -> None:
        """Experts outside the best groups get the key of group_mask. Group g's score key lies in lane g."""
        width = self.problem.num_experts // self.spec.num_groups
        group_key, kept = Local(1, "int32", name="group_key"), Local(1, "int32", name="kept")
        group_key[0], kept[0] = T.int32(TAKEN), T.int32(0)
        with T.serial(self.spec.num_groups) as g:
            self.pick(lambda i: self.index(i) // width == g)
            score, place = Local(1, "int32"), Local(1, "int32")
            score[0] = self.best[0]
            if self.spec.group_score == "sum_top2" and width > 1:
                place[0] = self.place[0]
                self.put(self.keys, T.int32(TAKEN))
                self.pick(lambda i: self.index(i) // width == g)
                total = T.Bind(self.rounded(value_of(score[0]) + value_of(self.best[0])))
                self.place[0] = place[0]
                self.put(self.keys, score[0])
                score[0] = key_of(total)
            with when(self.lane == g):
                group_key[0] = score[0]
        with T.serial(self.spec.groups_kept):
            top = T.Bind(warp_max(group_key[0]))
            first = T.Bind(warp_min(T.Select(group_key[0] == top, self.lane, T.int32(NAN_KEY))))
            kept[0] = T.bitwise_or(kept[0], T.shift_left(T.int32(1), first))
            with when(self.lane == first):
                group_key[0] = T.int32(TAKEN)
        masked = T.int32(_constant_key(self.spec.group_mask))
        for i in range(self.count):
            group = T.min(self.index(i) // width, T.int32(WARP - 1))
            off = T.bitwise_and(T.shift_right(kept[0], group), T.int32(1)) == 0
            with when(T.And(self.index(i) < self.problem.num_experts, off)):
                self.keys[i] = masked

    def score_chosen(self) -> None:
        """topk_then_score: the score function over the K chosen logits."""
        inside = self.lane < self.spec.top_k
        if self.spec.score == "softmax":
            top = T.Bind(warp_read(self.weight[0], T.int32(0)))  # the best comes first
            self.weight[0] = T.Select(inside, T.exp(self.weight[0] - top), T.float32(0))
            self.sum[0] = self.weight[0]
            warp_reduce(self.sum, 0, add)
            self.weight[0] = self.rounded(self.weight[0] / self.sum[0])
        elif self.spec.score == "sigmoid":
            self.weight[0] = T.Select(inside, self.rounded(sigmoid(self.weight[0])), T.float32(0))

    def sparsemixer(self) -> None:
        """Winner by winner, a softmax over the logits near the best one. Source: Phi-3.5-MoE."""
        rest = self.choice
        for i in range(self.count):
            rest[i] = self.scores[i]
        self.key_row(self.scores)
        with T.serial(self.spec.top_k) as k:
            self.pick()
            best = self.at_place(rest)

            def near(i: int, best: Expr = best) -> Expr:
                """exp(rest - best) of the logits within 2*eps of the best one, 0 for the others."""
                magnitude = T.Bind(
                    T.Select(self.scores[i] < T.float32(0), T.float32(0) - self.scores[i], self.scores[i])
                )
                bound = T.Select(magnitude < best, best, magnitude)
                gap = self.rounded(self.rounded(best - self.scores[i]) / bound)
                far = gap > T.float32(2 * self.spec.jitter_eps)
                return T.Select(far, T.float32(0), T.exp(rest[i] - best))

            total = self.total(near)
            chosen = T.Bind(self.rounded(T.float32(1) / total))  # NaN where best is NaN or infinite
            with when(self.lane == k):
                self.weight[0], self.expert[0] = chosen, self.place[0]
            self.put(self.keys, T.int32(TAKEN))
            self.put(rest, T.float32(float("-inf")))

    def weigh(self) -> None:
        """Renormalisation and scale, in place."""
        if self.spec.renormalise:
            self.sum[0] = self.weight[0]  # 0 in the lanes past K
            warp_reduce(self.sum, 0, add)
            eps, raw = T.float32(self.spec.renorm_eps), T.Bind(self.rounded(self.sum[0]))
            if self.spec.renorm_rule == "clamp":
                total = T.Bind(T.Select(raw < eps, eps, raw))  # NaN stays
            else:
                total = T.Bind(self.rounded(raw + eps))
            self.weight[0] = self.rounded(self.weight[0] / total)
        if self.spec.scale != 1.0:
            self.weight[0] = self.rounded(self.weight[0] * T.float32(self.spec.scale))

    def result(self) -> Expr:
        """The weight of what this lane holds, in the dtype of the result."""
        return round_bf16(self.weight[0]) if self.problem.result_dtype == "bfloat16" else self.weight[0]


def sigmoid(x: Expr) -> Expr:
    """f32; infinite x give 0 and 1."""
    return T.float32(1) / (T.float32(1) + T.exp(T.float32(0) - x))
