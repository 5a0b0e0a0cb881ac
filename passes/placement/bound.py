"""The best that any shares of one strategy could do: an upper bound on cache tokens and a lower bound on step time.

Cache: whatever the cut, some stage holds no more than its free memory over its cache bytes per token, both summed over
its ranks; the best cut maximises the least such stage. Time: each layer takes at least the exact fewest makespan of its
whole units over the ranks, experts at least the mean over groups and at least what the heaviest or the most crowded
group must take; the best cut minimises the slowest stage. Collectives and overheads do not depend on shares.
"""

from __future__ import annotations

import math

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
from moec.passes.placement.shares import cut_by_sums, cut_stages, fewest_makespan
from moec.passes.placement.strategy import Strategy
from moec.passes.placement.units import replicated_bytes, vocab_row_bytes


def stage_ranks(strategy: Strategy, stage: int) -> slice:
    """The ranks of one stage."""
    return slice(stage * strategy.stage_ranks, (stage + 1) * strategy.stage_ranks)


def least_seconds(num: int, width: int, unit_s: np.ndarray, fixed_s: np.ndarray, ranks: slice) -> float:
    """Least time of a tensor on a stage, each of whose copies is dealt to `width` ranks: the slowest copy counts.

    Args:
        num: whole units. unit_s, fixed_s: f64[R] of every rank. ranks: the stage's.
    """
    starts = range(ranks.start, ranks.stop, width)
    copies = [slice(start, start + width) for start in starts]
    return max(fewest_makespan(num, unit_s[c]) + float(fixed_s[c].min()) for c in copies)


class Space:
    """What every stage of a strategy has room for, whatever the shares: its free memory as one, and that of its poorest
    cell, which holds a copy of attention a lane, its part of the tokens, and the experts that the others have no slots
    for. A cell is the fewest ranks that are whole lanes and whole expert groups.

    Arrays have two rows: of the stage, of a cell.
    """

    def __init__(self, problem: Problem, strategy: Strategy) -> None:
        cell = math.lcm(strategy.attention_tp, strategy.expert_tp) // strategy.attention_tp  # lanes
        needs = np.array([_needs(problem, strategy, lanes) for lanes in (strategy.lanes, cell)])  # [2, 2, L]
        self.weights, self.cache = np.concatenate([np.zeros((2, 2, 1)), needs.cumsum(axis=2)], axis=2).swapaxes(0, 1)
        self.num_layers, last = problem.shape.num_layers, strategy.stages - 1
        by_cell = problem.usable_bytes().reshape(strategy.stages, strategy.lanes // cell, -1).sum(axis=2)
        self.free = np.stack([by_cell.sum(axis=1), by_cell.min(axis=1)], axis=1)  # [stages, 2]
        table = float(problem.shape.vocab * vocab_row_bytes(problem.shape)) * np.array([strategy.lanes, cell])
        self.free[0] -= table
        self.free[last] -= 0.0 if problem.shape.tied_embeddings and last == 0 else table

    def tokens(self, stage: int, start: int, end: int) -> float:
        """Cached tokens that a stage of layers [start, end) has room for; negative where the weights have none."""
        left = self.free[stage] - (self.weights[:, end] - self.weights[:, start])
        return float(np.min(left / np.maximum(self.cache[:, end] - self.cache[:, start], 1e-9)))

    def allowed(self, stage: int, tokens: float) -> np.ndarray:
        """bool[L + 1, L + 1]: whether the stage has room for layers [start, end) and so many cached tokens."""
        need = self.weights + tokens * self.cache
        held = need[:, None, :] - need[:, :, None]
        return np.all(held <= self.free[stage][:, None, None] * (1 + 1e-9), axis=0)


def kv_token_bound(problem: Problem, strategy: Strategy) -> tuple[float, list[int]]:
    """Cache tokens of one replica that no shares of this strategy exceed (negative where the weights cannot fit), and
    the stage boundaries that reach it."""
    space = Space(problem, strategy)
    cuts = cut_stages(space.num_layers, strategy.stages, lambda *stage: -space.tokens(*stage))
    return min(space.tokens(s, cuts[s], cuts[s + 1]) for s in range(strategy.stages)), cuts


def _needs(problem: Problem, strategy: Strategy, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """f64[L]: least bytes of each layer on some lanes of a stage, and the bytes that a cached token of the stage costs
    them on average."""
    weights = layer_bytes(problem, strategy, lanes, lambda experts: fewest_held(experts, strategy, lanes))
    ranks = lanes * strategy.attention_tp
    weights += [ranks * replicated_bytes(problem.shape, i) for i in range(problem.shape.num_layers)]
    per_token = np.zeros(problem.shape.num_layers)
    for class_idx in range(len(problem.shape.layers)):
        units = problem.attention(class_idx, strategy.attention_tp)
        values = units.num * units.kv_per_unit + strategy.attention_tp * units.kv_fixed
        per_token[problem.layer_class_index == class_idx] = values * problem.kv_bytes * lanes / strategy.lanes
    return weights, per_token


def fewest_held(num_experts: int, strategy: Strategy, lanes: int) -> int:
    """The fewest experts, copies among them, that some lanes of a stage hold, which are whole groups: those that the
    others have no slots for."""
    slots, inside = expert_slots(num_experts, strategy), lanes * strategy.attention_tp // strategy.expert_tp
    held = slots * strategy.expert_groups if strategy.spare_slots else num_experts
    return max(held - slots * (strategy.expert_groups - inside), 0)


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
        self.rates, self.space = Rates.of(problem, params), Space(problem, strategy)

    def seconds(self, load: StepLoad, quick: bool = False, tokens: float = 0.0) -> float:
        """A lower bound on the seconds of one step; `quick` counts layers instead of searching the best cut (equal
        devices). tokens: of layouts that cache so many; infinite where none can."""
        s, micro = self.strategy, self._micro(load)
        if quick:
            until = np.concatenate([[0.0], np.cumsum(self.layer_seconds(0, micro))])
            return self._host(load) + s.stages * self._slowest_stage_at_least(until, float(self._ends(micro).min()))
        return self._host(load) + s.stages * self._best_cuts(micro, tokens)[0]

    def best_cuts(self, load: StepLoad, tokens: float = 0.0) -> list[int] | None:
        """Stage boundaries with the least slowest stage and room for so many tokens; None where no cut has that."""
        seconds, cuts = self._best_cuts(self._micro(load), tokens)
        return cuts if np.isfinite(seconds) else None

    def _micro(self, load: StepLoad) -> StepLoad:
        stages = self.strategy.stages
        return StepLoad(load.sequences / stages, load.context, load.prefill_tokens / stages, load.prefill_context)

    def _best_cuts(self, micro: StepLoad, tokens: float) -> tuple[float, list[int]]:
        stages = range(self.strategy.stages)
        times = [np.concatenate([[0.0], np.cumsum(self.layer_seconds(stage, micro))]) for stage in stages]
        allowed = [self.space.allowed(stage, tokens) for stage in stages]
        return cut_by_sums(times, self._ends(micro).tolist(), allowed)

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
        ranks = stage_ranks(s, stage)
        attention = least_seconds(units.num, s.attention_tp, per_unit, fixed, ranks)
        if dense is None:
            return attention
        cost = matrix_seconds(dense.bytes_per_unit, dense.params_per_unit, n, self.rates.memory, self.rates.experts)
        return attention + least_seconds(
            dense.num, s.attention_tp, cost * self.rates.slower["dense"], np.zeros(len(cost)), ranks
        )

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
        slower = self.rates.slower["experts"][ranks]
        return float((self.rates.memory[ranks] / slower).mean()), float((self.rates.experts[ranks] / slower).mean())

    def _ends(self, load: StepLoad) -> np.ndarray:
        """f64[stages]: output projection and stage hand-over."""
        s, hidden = self.strategy, self.problem.shape.hidden
        sends = send_seconds(self.problem, s, load.sequences + load.prefill_tokens, self.params)
        cost = matrix_seconds(2.0 * hidden, hidden, load.sequences / s.lanes, self.rates.memory, self.rates.bf16)
        last = stage_ranks(s, s.stages - 1)
        head = least_seconds(
            self.problem.shape.vocab, s.attention_tp, cost * self.rates.slower["head"], np.zeros(len(cost)), last
        )
        return np.append(np.full(s.stages - 1, sends), sends + head)
