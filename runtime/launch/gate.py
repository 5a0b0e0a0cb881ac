"""The router by library calls: logits [T, E] to weights f32[T, K] and experts i32[T, K].

The spec is the text that the compiler's GateSpec writes; a field that is not given has its default. Ties go to the
lowest expert index, and NaN logits give NaN weights. docs/models.md says which family uses which field.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moec.runtime.errors import FormatError

Route = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
DEFAULTS: dict[str, Any] = {
    "score": "softmax",
    "order": "score_then_topk",
    "renormalise": False,
    "renorm_eps": 0.0,
    "renorm_rule": "add",
    "bias_on": "none",
    "num_groups": 1,
    "groups_kept": 1,
    "group_score": "max",
    "group_mask": 0.0,
    "scale": 1.0,
    "transform": "none",
    "transform_param": 0.0,
    "compute_dtype": "float32",
    "weights_dtype": "float32",
    "jitter_eps": 0.0,
}


def router(spec_text: str) -> Route:
    """-> route(logits [T,E], selection_bias [E] or None). Raises: FormatError: a field unknown to this runtime."""
    given = json.loads(spec_text)
    unknown = given.keys() - DEFAULTS.keys() - {"top_k"}
    if unknown or "top_k" not in given:
        raise FormatError(f"gate spec {spec_text} has unknown fields {sorted(unknown)} or no top_k; update moec")
    spec = SimpleNamespace(**{**DEFAULTS, **given})
    transform, choose = _transform(spec), _sparsemixer if spec.score == "sparsemixer" else _choose

    def route(logits: Tensor, selection_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        compute = logits if spec.compute_dtype == "logits" else logits.to(getattr(torch, spec.compute_dtype))
        weights, experts = choose(spec, transform(compute), selection_bias)
        if spec.renormalise:
            total = weights.sum(-1, keepdim=True)
            weights = weights / (
                total.clamp(min=spec.renorm_eps) if spec.renorm_rule == "clamp" else total + spec.renorm_eps
            )
        if spec.scale != 1.0:
            weights = weights * spec.scale
        rounded = logits.dtype if spec.weights_dtype == "logits" else getattr(torch, spec.weights_dtype)
        return weights.to(rounded).float(), experts.to(torch.int32)

    return route


def top_k_stable(scores: Tensor, k: int) -> Tensor:
    """scores [.., E] -> i64[.., k], best first, equal scores in index order (torch.topk promises no order)."""
    return torch.sort(scores, dim=-1, descending=True, stable=True)[1][..., :k]


def _transform(spec: SimpleNamespace) -> Callable[[Tensor], Tensor]:
    param = spec.transform_param
    return {
        "none": lambda l: l,
        "std": lambda l: (l - l.mean(-1, keepdim=True)) / (l.std(-1, keepdim=True) + param) if len(l) else l,
        "temperature": lambda l: l / param,
        "tanh_cap": lambda l: torch.tanh(l / param) * param,
    }[spec.transform]


def _score(name: str, logits: Tensor) -> Tensor:
    return logits.softmax(-1) if name == "softmax" else torch.sigmoid(logits) if name == "sigmoid" else logits


def _choose(spec: SimpleNamespace, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    score_first = spec.order == "score_then_topk"
    scores = _score(spec.score, logits) if score_first else logits
    choice = scores
    if spec.bias_on != "none" and bias is not None:
        choice = (logits if spec.bias_on == "logits" else scores) + bias.to(scores.dtype)
    if spec.num_groups > 1:
        choice = _mask_groups(spec, choice)
    experts = top_k_stable(choice, spec.top_k)
    chosen = scores.gather(-1, experts)
    return (chosen if score_first else _score(spec.score, chosen)), experts


def _mask_groups(spec: SimpleNamespace, choice: Tensor) -> Tensor:
    grouped = choice.view(choice.shape[0], spec.num_groups, choice.shape[1] // spec.num_groups)  # [T, G, E/G]
    best = grouped.amax(-1) if spec.group_score == "max" else grouped.topk(min(2, grouped.shape[-1]), -1)[0].sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, top_k_stable(best, spec.groups_kept), True)
    return grouped.masked_fill(~kept.unsqueeze(-1), spec.group_mask).view_as(choice)


def _sparsemixer(spec: SimpleNamespace, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """K winners in turn, each weighed by a softmax over the logits that are near it. Source: Phi-3.5-MoE."""
    weights, experts, rest = [], [], logits
    for _ in range(spec.top_k):
        winner = top_k_stable(rest, 1)
        best = rest.gather(-1, winner)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * spec.jitter_eps
        weights.append(rest.masked_fill(far, float("-inf")).softmax(-1).gather(-1, winner))
        experts.append(winner)
        rest = rest.scatter(-1, winner, float("-inf"))
    return torch.cat(weights, -1), torch.cat(experts, -1)
