"""The certificate of a plan: terms from which memory, objective and lower bound can be worked out again by anyone.

A term is one tensor of one layer class under one strategy: how many whole units it has, over how many ranks a copy is
dealt, bytes, cached values and seconds of one unit. For every strategy the certificate states its terms at the load
that its cache bound allows, and where memory and speed pull apart also at loads below it: each entry bounds the layouts
that cache more tokens than the entry before and up to its own. verify.py works out from these that no cut and no
whole-unit shares beat the stated bound. The plan's lower bound is the least over strategies. The seconds of a unit are
the stated cost model (cost.py).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moec.passes.placement.bound import expert_slots, least_seconds, stage_ranks
from moec.passes.placement.cost import (
    CostParameters,
    Rates,
    StepLoad,
    attention_seconds,
    layer_collectives,
    matrix_seconds,
    send_seconds,
)
from moec.passes.placement.layout import Problem
from moec.passes.placement.search import Candidate, SearchResult
from moec.passes.placement.serving import engine_limits, steady_load
from moec.passes.placement.strategy import Strategy
from moec.passes.placement.units import Units, replicated_bytes, vocab_row_bytes
from moec.passes.placement.weight_format import attention_format


def full_load(result: SearchResult, candidate: Candidate, kv_tokens: float) -> StepLoad:
    """The steady step of one replica with `kv_tokens` of cache, or with the batch that was asked for."""
    request = result.request
    if request.batch:
        return steady_load(request.batch / candidate.strategy.replicas, request.workload)
    most, _ = engine_limits(kv_tokens / request.workload.total_len, request.workload)
    return steady_load(most, request.workload)


def certificate(result: SearchResult) -> dict[str, object]:
    """Objective and lower bound in seconds per output token of the whole mesh, their gap, and what proves them."""
    request, best = result.request, result.best
    finite = bool(request.workload.num_requests)
    out: dict[str, object] = {
        "unit": "seconds per output token",
        "scope": request.strategy.name if request.strategy else "all strategies",
        "kind": "finite queue, simulated" if finite else "steady state",
        "strategies": [
            _entry(result, c, tokens)
            for c in result.candidates
            if c.kv_tokens_bound
            for tokens in (*c.steps, c.kv_tokens_bound)
        ],
    }
    if best is None:
        return out
    objective, bound = 1.0 / best.tokens_per_s, 1.0 / max(result.tokens_per_s_bound, best.tokens_per_s)
    plan = _entry(result, best, best.kv_tokens)
    return out | {"objective": objective, "lower_bound": bound, "gap": objective / bound - 1.0, "plan": plan}


def _entry(result: SearchResult, candidate: Candidate, kv_tokens: float) -> dict[str, object]:
    request, strategy = result.request, candidate.strategy
    problem = request.problem(strategy)
    rate = candidate.tokens_per_s_bound
    load = full_load(result, candidate, max(kv_tokens, request.workload.total_len))
    return {
        "strategy": strategy.name,
        "kv_tokens": kv_tokens,
        "lower_bound": 1.0 / rate if rate > 0 else None,
        **structure(strategy, request.trace.counts.shape[1]),
        **terms(problem, strategy, request.params, load),
    }


def structure(strategy: Strategy, num_experts: int) -> dict[str, int]:
    """The numbers of a strategy that a verifier needs."""
    return {
        "replicas": strategy.replicas,
        "stages": strategy.stages,
        "attention_tp": strategy.attention_tp,
        "expert_groups": strategy.expert_groups,
        "expert_tp": strategy.expert_tp,
        "expert_slots": expert_slots(num_experts, strategy),
        "copies": int(strategy.spare_slots > 0),
    }


def terms(problem: Problem, strategy: Strategy, params: CostParameters, load: StepLoad) -> dict[str, object]:
    """The terms of every layer class and of both ends for one micro-batch of `load`; lists of seconds have one entry
    a rank."""
    p, s = problem, strategy
    micro = StepLoad(load.sequences / s.stages, load.context, load.prefill_tokens / s.stages, load.prefill_context)
    lane = StepLoad(micro.sequences / s.lanes, load.context, micro.prefill_tokens / s.lanes, load.prefill_context)
    tokens, in_lane, rates = (
        micro.sequences + micro.prefill_tokens,
        lane.sequences + lane.prefill_tokens,
        Rates.of(p, params),
    )
    stages = [stage_ranks(s, stage) for stage in range(s.stages)]
    classes, layer, none = [], 0, np.zeros(len(rates.memory))

    def dealt(units: Units, width: int, group: int, unit_s: np.ndarray, fixed_s: np.ndarray) -> dict[str, object]:
        """A term with the least time of its whole units on every stage."""
        least = [least_seconds(units.num, width, unit_s, fixed_s, ranks) for ranks in stages]
        return _term(units, width, group, unit_s, fixed_s) | {"least_s": least}

    for class_idx, c in enumerate(p.shape.layers):
        attention, dense, expert = p.attention(class_idx, s.attention_tp), p.dense(class_idx), p.expert(class_idx)
        per_unit, fixed = attention_seconds(p, class_idx, attention, rates, lane)
        group = attention_format(p.weights).group_for(c.attention.v_head_dim or c.attention.head_dim, "attention")
        found = {"attention": dealt(attention, s.attention_tp, group, per_unit, fixed)}
        if dense is not None:
            cost = matrix_seconds(dense.bytes_per_unit, dense.params_per_unit, in_lane, rates.memory, rates.experts)
            width = c.dense.width if c.dense else c.moe.shared_width if c.moe else 0
            found["dense"] = dealt(
                dense, s.attention_tp, p.weights.group_for(width, "FFN"), cost * rates.slower["dense"], none
            )
        if expert is not None and c.moe is not None:
            read = expert.bytes_per_unit / rates.memory * rates.slower["experts"]
            slots = 2.0 * c.moe.top_k * tokens * expert.params_per_unit / rates.experts * rates.slower["experts"]
            found["experts"] = _term(expert, s.expert_tp, p.weights.group_for(c.moe.width, "expert"), read, none) | {
                "slots_s": slots.tolist()
            }
        other = sum(layer_collectives(s, p, class_idx, tokens, params).values()) + params.layer_overhead_s
        found["replicated"] = _term(Units(1, replicated_bytes(p.shape, layer), 0), 1, 0, none, none)
        classes.append({"terms": found, "other_s": other})
        layer += c.count
    hidden, send = p.shape.hidden, send_seconds(p, s, tokens, params)
    row = Units(p.shape.vocab, vocab_row_bytes(p.shape), hidden)
    tied = p.shape.tied_embeddings and s.stages == 1
    head = matrix_seconds(2.0 * hidden, hidden, lane.sequences, rates.memory, rates.bf16) * rates.slower["head"]
    return {
        "sequences": load.sequences,
        "tokens": tokens,
        "classes": classes,
        "embedding": _term(row, s.attention_tp, 0, none, none),
        "head": dealt(replace(row, bytes_per_unit=0) if tied else row, s.attention_tp, 0, head, none),
        "send_s": send,
        "host_s": params.step_overhead_s + params.sequence_overhead_s * load.sequences,
    }


def _term(units: Units, width: int, group: int, unit_s: np.ndarray, fixed_s: np.ndarray) -> dict[str, object]:
    return {
        "units": units.num,
        "width": width,
        "group": group,
        "bytes": units.bytes_per_unit,
        "fixed_bytes": units.fixed_bytes,
        "params": units.params_per_unit,
        "fixed_params": units.fixed_params,
        "kv": units.kv_per_unit,
        "fixed_kv": units.kv_fixed,
        "unit_s": unit_s.tolist(),
        "fixed_s": fixed_s.tolist(),
    }
