"""How often each expert is chosen: recorded or synthetic traces, and scenarios of what may come instead."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moec.passes.hardware.errors import PlacementError
from moec.passes.placement.model_shape import ModelShape

DRIFT = 0.25
"""Standard deviation of the router-logit change that scenarios assume between a trace and its use."""


@dataclass(frozen=True)
class RoutingTrace:
    """Routed slots per expert.

    Args:
        counts: i64[M, E], one row per MoE layer in order, slots sent to each expert.
        source: what the counts are, for reports: a file name or the synthetic rule.
    """

    counts: np.ndarray
    source: str

    def popularity(self) -> np.ndarray:
        """f64[M, E]: the chance that a slot goes to an expert; a layer with no counts is even."""
        total = self.counts.sum(axis=1, keepdims=True)
        even = np.full(self.counts.shape, 1.0 / self.counts.shape[1])
        return np.where(total > 0, self.counts / np.maximum(total, 1), even)


def num_moe_layers(shape: ModelShape) -> int:
    """M: layers with routed experts."""
    return sum(c.count for c in shape.layers if c.moe is not None)


def zipf_logits(num_layers: int, num_experts: int, exponent: float, seed: int) -> np.ndarray:
    """f64[L, E]: router logits whose softmax is a Zipf law, permuted differently in each layer."""
    rng = np.random.default_rng(seed)
    ranked = -exponent * np.log(np.arange(1, num_experts + 1))
    return np.stack([rng.permutation(ranked) for _ in range(num_layers)])


def sample_trace(logits: np.ndarray, top_k: int, num_tokens: int, seed: int, drift: float = 0.0) -> RoutingTrace:
    """Routes num_tokens tokens by Gumbel top-k over `logits` [L, E], changed by N(0, drift) per layer and expert
    first."""
    rng = np.random.default_rng(seed)
    moved = logits + drift * rng.standard_normal(logits.shape)
    counts = np.zeros(logits.shape, dtype=np.int64)
    for layer, row in enumerate(moved):
        scores = row + rng.gumbel(size=(num_tokens, len(row)))
        chosen = (
            np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
            if top_k < len(row)
            else np.arange(len(row))[None].repeat(num_tokens, 0)
        )
        counts[layer] = np.bincount(chosen.ravel(), minlength=len(row))
    return RoutingTrace(counts, f"sampled, top-{top_k}, {num_tokens} tokens, seed {seed}, drift {drift}")


def zipf_trace(shape: ModelShape, exponent: float, seed: int = 0, num_tokens: int = 4096) -> RoutingTrace:
    """The synthetic trace that a plan uses where no trace is given; experts of all MoE layers must agree in number."""
    moe = shape.moe
    logits = zipf_logits(num_moe_layers(shape), moe.num_experts, exponent, seed)
    counts = sample_trace(logits, moe.top_k, num_tokens, seed + 1).counts
    return RoutingTrace(counts, f"synthetic Zipf {exponent:g}, seed {seed}")


def trace_from_dict(data: object, shape: ModelShape, where: str) -> RoutingTrace:
    """A trace from parsed JSON {"model"?, "counts": [[..] per MoE layer]}.

    Raises:
        PlacementError: it is of another model, or its counts are not whole numbers of at least 0.
    """
    if not isinstance(data, dict) or not isinstance(data.get("counts"), list):
        raise PlacementError(f"{where}: expected an object with 'counts', a list per MoE layer of slots per expert")
    if data.get("model", shape.name) != shape.name:
        raise PlacementError(
            f"{where}: the trace is of model '{data['model']}', the plan is for '{shape.name}'; record one with moec "
            "trace"
        )
    expected = (num_moe_layers(shape), shape.moe.num_experts)
    lengths = {len(row) if isinstance(row, list) else -1 for row in data["counts"]}
    if len(data["counts"]) != expected[0] or lengths != {expected[1]}:
        got = f"{len(data['counts'])} layers of {', '.join(map(str, sorted(lengths)))} experts"
        raise PlacementError(
            f"{where}: the trace has {got}, {shape.name} has {expected[0]} MoE layers of {expected[1]} experts; it is "
            "of another model"
        )
    try:
        counts = np.array(data["counts"], dtype=np.float64)
    except (TypeError, ValueError):
        counts = np.array([[np.nan]])
    if not np.all(np.isfinite(counts)) or np.any(counts < 0) or np.any(counts > 2**53):
        raise PlacementError(f"{where}: counts must be numbers of at least 0")
    return RoutingTrace(counts, where)


def scenarios(
    popularity: np.ndarray, num_slots: int, num_scenarios: int, seed: int, drift: float = DRIFT
) -> np.ndarray:
    """f64[N, E]: loads that may come in place of one layer's `popularity` [E]: half resampled, half drifted and
    resampled."""
    rng = np.random.default_rng(seed)
    scale = np.where(np.arange(num_scenarios) % 2, drift, 0.0)[:, None]
    moved = popularity * np.exp(scale * rng.standard_normal((num_scenarios, len(popularity))))
    moved /= moved.sum(axis=1, keepdims=True)
    return np.stack([rng.multinomial(num_slots, row) for row in moved]) / num_slots
