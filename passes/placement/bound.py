"""The best that any shares of one strategy could do: an upper bound on cache tokens and a lower bound on step time.

Cache: whatever the cut, some stage holds no more than its free memory over its cache bytes per token, both summed over
its ranks; the best cut maximises the least such stage. Time: each layer takes at least the exact fewest makespan of its
whole units over the ranks, experts at least the mean over groups and at least what the heaviest or the most crowded
group must take; the best cut minimises the slowest stage. Collectives and overheads do not depend on shares.
"""

from __future__ import annotations

import numpy as np

from moec.passes.placement.build import layer_bytes
from moec.passes.placement.cost import (
    CostParameters,
    Rates,
    StepLoad,
    attention_seconds,
    layer_collectives,
    matrix_seconds,
    send_seconds,
    touched,
)
from moec.passes.placement.layout import Problem
from moec.passes.placement.shares import cut_stages, fewest_makespan
from moec.passes.placement.strategy import Strategy
from moec.passes.placement.units import replicated_bytes, vocab_row_bytes


def stage_ranks(strategy: Strategy, stage: int) -> slice:
    """The ranks of one stage."""
    return slice(stage * strategy.stage_ranks, (stage + 1) * strategy.stage_ranks)


def kv_token_bound(problem: Problem, strategy: Strategy) -> tuple[float, list[int]]:
    """Cache tokens of one replica that no shares of this strategy exceed (negative where the weights cannot fit), and
    the stage boundaries that reach it."""
    per_layer = layer_bytes(problem, strategy) + _copies_bytes(problem, strategy)
    per_layer += [strategy.stage_ranks * replicated_bytes(problem.shape, i) for i in range(problem.shape.num_layers)]
    per_token = np.zeros(problem.shape.num_layers)
    for class_idx in range(len(problem.shape.layers)):
        units = problem.attention(class_idx, strategy.attention_tp)
        values = units.num * units.kv_per_unit + strategy.attention_tp * units.kv_fixed
        per_token[problem.layer_class_index == class_idx] = values * problem.kv_bytes
    weights, cache = (np.concatenate([[0.0], np.cumsum(v)]) for v in (per_layer, per_token))
    free = problem.usable_bytes()
    table = strategy.lanes * float(problem.shape.vocab * vocab_row_bytes(problem.shape))
    last = strategy.stages - 1
    tied = problem.shape.tied_embeddings and last == 0

    def shortage(stage: int, start: int, end: int) -> float:
        held = weights[end] - weights[start] + table * ((stage == 0) + (stage == last and not tied))
        return -(float(free[stage_ranks(strategy, stage)].sum()) - held) / max(cache[end] - cache[start], 1e-9)

    cuts = cut_stages(problem.shape.num_layers, strategy.stages, shortage)
    least = min(-shortage(s, cuts[s], cuts[s + 1]) for s in range(strategy.stages))
    return least, cuts


def _copies_bytes(problem: Problem, strategy: Strategy) -> np.ndarray:
    """f64[L]: bytes of the expert copies that fill the slots of a strategy with spare slots."""
    out = np.zeros(problem.shape.num_layers)
    for class_idx, c in enumerate(problem.shape.layers):
        expert = problem.expert(class_idx)
        if expert is None or c.moe is None or not strategy.spare_slots:
            continue
        slots = expert_slots(c.moe.num_experts, strategy)
        part = expert.num * expert.bytes_per_unit + expert.fixed_bytes
        out[problem.layer_class_index == class_idx] = (slots * strategy.expert_groups - c.moe.num_experts) * part
    return out


def expert_slots(num_experts: int, strategy: Strategy) -> int:
    """Expert slots of one group."""
    return min(-(-num_experts // strategy.expert_groups) + strategy.spare_slots, num_experts)


class BoundModel:
    """Like StepModel, but for the best conceivable shares of a strategy.

    Args:
        load_bounds: f64[L], least possible greatest group load of each layer's slots, from place_experts or load_bound.
    """

    def __init__(
        self,
        problem: Problem,
        strategy: Strategy,
        params: CostParameters,
        popularity: np.ndarray,
        load_bounds: np.ndarray,
    ) -> None:
        self.problem, self.strategy, self.params = problem, strategy, params
        self.popularity, self.load_bounds = popularity, load_bounds
        self.rates = Rates.of(problem, params)

    def seconds(self, load: StepLoad, quick: bool = False) -> float:
        """A lower bound on the seconds of one step; `quick` counts layers instead of searching the best cut (equal
        devices)."""
        s, micro = self.strategy, self._micro(load)
        if quick:
            until = np.concatenate([[0.0], np.cumsum(self.layer_seconds(0, micro))])
            return self._host(load) + s.stages * self._slowest_stage_at_least(until, float(self._ends(micro).min()))
        return self._host(load) + s.stages * self._best_cuts(micro)[0]

    def best_cuts(self, load: StepLoad) -> list[int]:
        """Stage boundaries with the least slowest stage."""
        return self._best_cuts(self._micro(load))[1]

    def _micro(self, load: StepLoad) -> StepLoad:
        stages = self.strategy.stages
        return StepLoad(load.sequences / stages, load.context, load.prefill_tokens / stages, load.prefill_context)

    def _best_cuts(self, micro: StepLoad) -> tuple[float, list[int]]:
        s = self.strategy
        times = [np.concatenate([[0.0], np.cumsum(self.layer_seconds(stage, micro))]) for stage in range(s.stages)]
        ends = self._ends(micro)

        def cost(stage: int, start: int, end: int) -> float:
            return float(times[stage][end] - times[stage][start] + ends[stage])

        cuts = cut_stages(self.problem.shape.num_layers, s.stages, cost)
        return max(cost(i, cuts[i], cuts[i + 1]) for i in range(s.stages)), cuts

    def _host(self, load: StepLoad) -> float:
        return self.params.step_overhead_s + self.params.sequence_overhead_s * load.sequences

    def _slowest_stage_at_least(self, until: np.ndarray, end: float) -> float:
        """Some stage holds at least the mean time, and at least ceil(L / P) layers."""
        layers = np.sort(np.diff(until))
        most = -(-len(layers) // self.strategy.stages)
        return max(float(until[-1]) / self.strategy.stages, float(layers[:most].sum())) + end

    def layer_seconds(self, stage: int, load: StepLoad) -> np.ndarray:
        """f64[L]: least time of each layer, were it on this stage."""
        s, n = self.strategy, load.sequences + load.prefill_tokens
        lane = StepLoad(load.sequences / s.lanes, load.context, load.prefill_tokens / s.lanes, load.prefill_context)
        out = np.zeros(self.problem.shape.num_layers)
        for class_idx in range(len(self.problem.shape.layers)):
            rows = self.problem.layer_class_index == class_idx
            fixed = (
                sum(layer_collectives(s, self.problem, class_idx, n, self.params).values())
                + self.params.layer_overhead_s
            )
            out[rows] = fixed + self._split(stage, class_idx, lane) + self._experts(stage, class_idx, n)[rows]
        return out

    def _split(self, stage: int, class_idx: int, lane: StepLoad) -> float:
        """Attention, and dense or shared FFN, dealt to the ranks of each lane; the slowest lane counts."""
        s, n = self.strategy, lane.sequences + lane.prefill_tokens
        units = self.problem.attention(class_idx, s.attention_tp)
        per_unit, fixed = attention_seconds(self.problem, class_idx, units, self.rates, lane)
        dense = self.problem.dense(class_idx)
        first, slowest_attention, slowest_dense = stage * s.stage_ranks, 0.0, 0.0
        for start in range(first, first + s.stage_ranks, s.attention_tp):
            ranks = slice(start, start + s.attention_tp)
            slowest_attention = max(
                slowest_attention, fewest_makespan(units.num, per_unit[ranks]) + float(fixed[ranks].min())
            )
            if dense is not None:
                cost = matrix_seconds(
                    dense.bytes_per_unit, dense.params_per_unit, n, self.rates.memory[ranks], self.rates.experts[ranks]
                )
                slowest_dense = max(slowest_dense, fewest_makespan(dense.num, cost))
        return slowest_attention + slowest_dense

    def _experts(self, stage: int, class_idx: int, tokens: float) -> np.ndarray:
        """f64[L]: least expert time of each layer of the class."""
        s, expert = self.strategy, self.problem.expert(class_idx)
        moe = self.problem.shape.layers[class_idx].moe
        if expert is None or moe is None:
            return np.zeros(self.problem.shape.num_layers)
        ranks = stage_ranks(s, stage)
        blocks = (
            fewest_makespan(expert.num, np.ones(s.expert_tp))
            if self.problem.mesh.is_uniform
            else expert.num / s.expert_tp
        )
        chance = touched(moe.top_k * self.popularity, tokens)  # [L, E]
        ordered = np.sort(chance, axis=1)
        slots = expert_slots(moe.num_experts, s)
        copies = slots * s.expert_groups - moe.num_experts if s.spare_slots else 0
        crowded = slots if s.spare_slots else -(-moe.num_experts // s.expert_groups)
        read = np.maximum(
            (chance.sum(axis=1) + copies * ordered[:, 0]) / s.expert_groups, ordered[:, :crowded].sum(axis=1)
        )
        if not self.problem.mesh.is_uniform:
            read = (chance.sum(axis=1) + copies * ordered[:, 0]) / s.expert_groups
        memory, flops = self._mean_rates(ranks)
        by_bytes = read * blocks * expert.bytes_per_unit / memory
        loads = self.load_bounds if self.problem.mesh.is_uniform else np.full(len(read), 1.0 / s.expert_groups)
        by_flops = 2.0 * loads * moe.top_k * tokens * blocks * expert.params_per_unit / flops
        return np.maximum(by_bytes, by_flops)

    def _mean_rates(self, ranks: slice) -> tuple[float, float]:
        """Mean rates of the stage's ranks: with unequal devices total work over total rate bounds."""
        return float(self.rates.memory[ranks].mean()), float(self.rates.experts[ranks].mean())

    def _ends(self, load: StepLoad) -> np.ndarray:
        """f64[stages]: output projection and stage hand-over."""
        s, hidden = self.strategy, self.problem.shape.hidden
        head, sequences = 0.0, load.sequences / s.lanes
        sends = send_seconds(self.problem, s, load.sequences + load.prefill_tokens, self.params)
        for start in range((s.stages - 1) * s.stage_ranks, s.stages * s.stage_ranks, s.attention_tp):
            ranks = slice(start, start + s.attention_tp)
            cost = matrix_seconds(2.0 * hidden, hidden, sequences, self.rates.memory[ranks], self.rates.bf16[ranks])
            head = max(head, fewest_makespan(self.problem.shape.vocab, cost))
        return np.append(np.full(s.stages - 1, sends), sends + head)
