"""Step time of a layout from bytes, FLOPs, distinct experts touched, collectives and launches.

One step of a stage over n tokens (decode sequences and prefill tokens together) takes, per layer, the sum of
    attention    max over ranks [ max(weight bytes / B, 2 * weights * n / F) + cached bytes / B + prefill FLOPs / F ]
    dense        max over ranks [ max(weight bytes / B, 2 * weights * n / F) ], dense and shared FFN blocks
    experts      max over ranks [ max(bytes of distinct resident experts touched / B, 2 * weights * slots / F) ]
    collectives  and a launch overhead;
the step adds the output projection, a per-step and a per-sequence overhead. B and F are a device's peaks times a
fitted efficiency. A copied expert counts as touched wherever it is resident. An all-reduce of S bytes over n ranks
takes a + 2(n-1)/n * S/b, the other collectives half of the latency and their own volume.

Every term g of n has g(n)/n not increasing, so more sequences in flight never lower tokens per second. With P stages a
step runs P micro-batches: P times the slowest stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from moec.passes.hardware.device import Device
from moec.passes.hardware.mesh import Link
from moec.passes.placement.layout import Layout, Problem
from moec.passes.placement.strategy import Strategy
from moec.passes.placement.units import Units


@dataclass(frozen=True)
class CostParameters:
    """Fitted figures; data/cost_parameters.json holds them with the rows that they were fitted on.

    Args:
        memory: fraction of peak bandwidth that weight and cache reads reach.
        compute: fraction of the peak dense rate by arithmetic format.
        link: fraction of a link's peak by link kind.
        latency: factor on a link's published small-message latency.
        layer_overhead_s, step_overhead_s, sequence_overhead_s: launches of a layer's kernels; host time of a step, and
            of one sequence in a step.
        log_error: standard deviation of log(predicted / measured) on rows left out.
        measured: device name -> part of the step -> factor on its time, from measured kernels (measured.py).
    """

    memory: float
    compute: dict[str, float]
    link: dict[str, float]
    latency: float
    layer_overhead_s: float
    step_overhead_s: float
    sequence_overhead_s: float
    log_error: float = 0.0
    measured: dict[str, dict[str, float]] = field(default_factory=dict)

    def bytes_per_s(self, device: Device) -> float:
        """What reads of weights and caches reach on a device."""
        return device.bytes_per_s * self.memory

    def flops(self, device: Device, arithmetic: str) -> float:
        """FLOP/s that a device reaches in an arithmetic format; in bf16 where it has no units for the format."""
        native = arithmetic if arithmetic in device.flops else "bf16"
        return device.flops[native] * self.compute.get(native, self.compute["bf16"])


@dataclass(frozen=True)
class StepLoad:
    """One step's work in a replica: decode sequences, their mean context, prefill tokens and their mean context."""

    sequences: float
    context: float
    prefill_tokens: float = 0.0
    prefill_context: float = 0.0


def collective_seconds(kind: str, num_bytes: float, num_ranks: int, link: Link, params: CostParameters) -> float:
    """Time of one collective.

    Args:
        kind: all_reduce, reduce_scatter, all_gather, all_to_all, or send (to one other rank).
        num_bytes: the whole value's; for all_to_all and send, what one rank sends.
    """
    if num_ranks == 1:
        return 0.0
    part = 1.0 if kind == "send" else (num_ranks - 1) / num_ranks
    rounds, latency = (2, 1.0) if kind == "all_reduce" else (1, 0.5)
    return latency * link.latency_s * params.latency + rounds * part * num_bytes / (
        link.bytes_per_s * params.link[link.kind]
    )


def send_seconds(problem: Problem, strategy: Strategy, tokens: float, params: CostParameters) -> float:
    """Time to hand `tokens` tokens of a stage to the next one: every rank sends its lane's; 0 for one stage."""
    if strategy.stages == 1:
        return 0.0
    num_bytes = tokens / strategy.lanes * problem.shape.hidden * 2.0
    return collective_seconds("send", num_bytes, 2, problem.mesh.link_for(2 * strategy.stage_ranks), params)


def layer_collectives(
    strategy: Strategy, problem: Problem, class_idx: int, tokens: float, params: CostParameters
) -> dict[str, float]:
    """Seconds of each collective of one layer over `tokens` tokens of the stage: the cheaper legal scheme.

    Attention over all ranks: two all-reduces; or, where experts are dealt out, reduce-scatter, two all-to-alls and an
    all-gather. Attention in lanes: an all-reduce in each lane, then two all-to-alls, or all-gather and reduce-scatter
    over the stage.
    """
    g, a, lanes = strategy.stage_ranks, strategy.attention_tp, strategy.lanes
    size = tokens * problem.shape.hidden * 2.0
    link, lane_link = problem.mesh.link_for(g), problem.mesh.link_for(a)
    lane_reduce = collective_seconds("all_reduce", size / lanes, a, lane_link, params)
    moe = problem.shape.layers[class_idx].moe
    if moe is None:
        return {"all-reduce": 2 * lane_reduce}
    reached = min(moe.top_k, strategy.expert_groups) * strategy.expert_tp
    sent = size / g * reached
    exchange = 2 * collective_seconds("all_to_all", sent, g, link, params)
    gather = collective_seconds("all_gather", size, g, link, params)
    scatter = collective_seconds("reduce_scatter", size, g, link, params)
    if lanes == 1:
        reduce = collective_seconds("all_reduce", size, g, link, params)
        if strategy.expert_groups > 1 and gather + scatter + exchange < 2 * reduce:
            return {"reduce-scatter": scatter, "all-to-all": exchange, "all-gather": gather}
        return {"all-reduce": 2 * reduce}
    shared = lane_reduce if moe.shared_width else 0.0
    if exchange < gather + scatter:
        return {"all-reduce": lane_reduce + shared, "all-to-all": exchange}
    return {"all-reduce": lane_reduce + shared, "all-gather": gather, "reduce-scatter": scatter}


def touched(probability: np.ndarray, tokens: float) -> np.ndarray:
    """Chance that at least one of `tokens` tokens picks an expert that a token picks with `probability`."""
    return -np.expm1(tokens * np.log1p(-np.minimum(probability, 1 - 1e-12)))


PARTS = ("attention", "dense", "experts", "head")
"""The parts of a step that are products with weights."""


@dataclass(frozen=True)
class Rates:
    """f64[R] per rank: bytes/s, FLOP/s of quantised matrices, of attention projections, and of bf16; and by part of
    the step the factor that measured kernels put on its time."""

    memory: np.ndarray
    experts: np.ndarray
    attention: np.ndarray
    bf16: np.ndarray
    slower: dict[str, np.ndarray]

    @staticmethod
    def of(problem: Problem, params: CostParameters) -> Rates:
        """The rates of each device of the mesh, in rank order."""

        def from_devices(rate: Callable[[Device], float]) -> np.ndarray:
            return np.array([rate(d) for d in problem.mesh.devices])

        arithmetic = problem.weights.arithmetic
        attention = "bf16" if problem.weights.experts_only else arithmetic
        return Rates(
            from_devices(params.bytes_per_s),
            from_devices(lambda d: params.flops(d, arithmetic)),
            from_devices(lambda d: params.flops(d, attention)),
            from_devices(lambda d: params.flops(d, "bf16")),
            {p: from_devices(lambda d, p=p: params.measured.get(d.name, {}).get(p, 1.0)) for p in PARTS},  # type: ignore[misc]
        )


def attention_seconds(
    problem: Problem, class_idx: int, units: Units, rates: Rates, load: StepLoad
) -> tuple[np.ndarray, np.ndarray]:
    """Time of one attention unit and of the fixed part on each rank, for one lane's load: (f64[R], f64[R])."""
    a = problem.shape.layers[class_idx].attention
    n = load.sequences + load.prefill_tokens
    context = min(load.context, a.window) if a.window else load.context
    past = min(load.prefill_context, a.window) if a.window else load.prefill_context
    cached = load.sequences * context * problem.kv_bytes / rates.memory
    width = 2 * (a.kv_lora_rank + a.rope_dim) if a.is_latent else 2 * a.head_dim
    score = 2.0 * units.query_heads_per_unit * width * load.prefill_tokens * past / rates.bf16
    per_unit = matrix_seconds(units.bytes_per_unit, units.params_per_unit, n, rates.memory, rates.attention)
    fixed = matrix_seconds(units.fixed_bytes, units.fixed_params, n, rates.memory, rates.attention)
    per_unit, fixed = per_unit * rates.slower["attention"], fixed * rates.slower["attention"]
    return per_unit + units.kv_per_unit * cached + score, fixed + units.kv_fixed * cached


def matrix_seconds(
    num_bytes: float, num_params: float, tokens: float, memory: np.ndarray, flops: np.ndarray
) -> np.ndarray:
    """Time of a matrix multiplication: reading its weights or doing its multiply-adds, whichever is longer."""
    return np.maximum(num_bytes / memory, 2.0 * num_params * tokens / flops)


class StepModel:
    """Step time of one layout under given parameters and routing.

    Args:
        popularity: f64[L, E], the chance that a routed slot goes to an expert; rows of MoE layers sum to 1.
    """

    def __init__(self, layout: Layout, params: CostParameters, popularity: np.ndarray) -> None:
        self.layout, self.params, self.popularity = layout, params, popularity
        self.rates = Rates.of(layout.problem, params)

    def seconds(self, load: StepLoad) -> float:
        """Seconds of one step."""
        return sum(self.parts(load).values())

    def parts(self, load: StepLoad) -> dict[str, float]:
        """Seconds of one step by part, on the slowest stage."""
        s = self.layout.strategy
        micro = StepLoad(load.sequences / s.stages, load.context, load.prefill_tokens / s.stages, load.prefill_context)
        per_stage = [self._stage_parts(stage, micro) for stage in range(s.stages)]
        slowest = max(per_stage, key=lambda parts: sum(parts.values()))
        out = {name: s.stages * value for name, value in slowest.items()}
        host = self.params.step_overhead_s + self.params.sequence_overhead_s * load.sequences
        return out | {"host": host}

    def _stage_parts(self, stage: int, load: StepLoad) -> dict[str, float]:
        layout, s = self.layout, self.layout.strategy
        lane = StepLoad(load.sequences / s.lanes, load.context, load.prefill_tokens / s.lanes, load.prefill_context)
        n = load.sequences + load.prefill_tokens
        out = {"attention": 0.0, "dense": 0.0, "experts": 0.0, "collectives": 0.0, "launch": 0.0}
        start, end = layout.cuts[stage], layout.cuts[stage + 1]
        classes = layout.problem.layer_class_index[start:end]
        for class_idx in np.unique(classes):
            rows = start + np.flatnonzero(classes == class_idx)
            out["attention"] += self._attention(int(class_idx), rows, lane)
            out["dense"] += self._dense(int(class_idx), rows, lane)
            out["experts"] += self._experts(int(class_idx), rows, n)
            collectives = layer_collectives(s, layout.problem, int(class_idx), n, self.params)
            out["collectives"] += len(rows) * sum(collectives.values())
            out["launch"] += len(rows) * self.params.layer_overhead_s
        if stage == s.stages - 1:
            out["head"] = self._head(lane)
        out["collectives"] += send_seconds(layout.problem, s, n, self.params)
        return out

    def _attention(self, class_idx: int, rows: np.ndarray, lane: StepLoad) -> float:
        units = self.layout.problem.attention(class_idx, self.layout.strategy.attention_tp)
        per_unit, fixed = attention_seconds(self.layout.problem, class_idx, units, self.rates, lane)
        held = self.layout.attention[rows]
        return float(np.sum(np.max(held * per_unit + (held > 0) * fixed, axis=1)))

    def _dense(self, class_idx: int, rows: np.ndarray, lane: StepLoad) -> float:
        units = self.layout.problem.dense(class_idx)
        if units is None:
            return 0.0
        n = lane.sequences + lane.prefill_tokens
        cost = matrix_seconds(units.bytes_per_unit, units.params_per_unit, n, self.rates.memory, self.rates.experts)
        return float(np.sum(np.max(self.layout.dense[rows] * cost * self.rates.slower["dense"], axis=1)))

    def _experts(self, class_idx: int, rows: np.ndarray, tokens: float) -> float:
        units, layout = self.layout.problem.expert(class_idx), self.layout
        moe = layout.problem.shape.layers[class_idx].moe
        if units is None or moe is None:
            return 0.0
        group = layout.group_of_rank()
        chosen = (moe.top_k * self.popularity[rows])[:, :, None] * layout.token_share[
            rows
        ]  # [rows, E, G], slots per token
        chance = touched(moe.top_k * self.popularity[rows], tokens)  # [rows, E]
        experts = (chance[:, :, None] * layout.resident[rows]).sum(axis=1)[:, group]
        slots = chosen.sum(axis=1)[:, group] * tokens
        held = layout.expert_blocks[rows]
        by_bytes = experts * held * units.bytes_per_unit / self.rates.memory
        by_flops = 2.0 * slots * held * units.params_per_unit / self.rates.experts
        return float(np.sum(np.max(np.maximum(by_bytes, by_flops) * self.rates.slower["experts"], axis=1)))

    def _head(self, lane: StepLoad) -> float:
        hidden = self.layout.problem.shape.hidden
        cost = matrix_seconds(2.0 * hidden, hidden, lane.sequences, self.rates.memory, self.rates.bf16)
        return float(np.max(self.layout.head * cost * self.rates.slower["head"]))
