"""GateSpec: everything that tells one router apart from another, and its one plain meaning."""

from __future__ import annotations

import dataclasses
import json

import torch
from torch import Tensor

SCORES = ("softmax", "sigmoid", "sparsemixer", "none")
ORDERS = ("score_then_topk", "topk_then_score")
TRANSFORMS = ("none", "std", "temperature", "tanh_cap")


@dataclasses.dataclass(frozen=True)
class GateSpec:
    """How logits f32[T, E] become weights f32[T, K] and experts i32[T, K].

    Args:
        top_k: K. score, order: which function, and whether it sees all E logits or the chosen K.
        renormalise: divide the weights by their sum; renorm_eps is added to it ("add") or bounds it below ("clamp").
        bias_on: a selection bias [E], used to choose and not to weigh, is added to "scores" or "logits"; "none".
        num_groups, groups_kept, group_score ("max" | "sum_top2"), group_mask: experts outside the kept groups get
            group_mask as their selection score.
        scale: factor on the weights, after renormalisation.
        transform, transform_param: on the logits first: "std" = (l - mean) / std with ddof 1 (param is the eps inside:
            Skywork), "temperature" = l / param, "tanh_cap" = param * tanh(l / param) (Grok).
        compute_dtype: dtype of the scores ("float32", "bfloat16", ...; "logits" = that of the logits).
        weights_dtype: dtype that the weights are rounded to at the end.
        jitter_eps: sparsemixer's eps.
    Ties go to the lowest expert index. A NaN logit gives NaN weights, never a silent zero row.
    Source: facts of each family in docs/models.md.
    """

    top_k: int
    score: str = "softmax"
    order: str = "score_then_topk"
    renormalise: bool = False
    renorm_eps: float = 0.0
    renorm_rule: str = "add"
    bias_on: str = "none"
    num_groups: int = 1
    groups_kept: int = 1
    group_score: str = "max"
    group_mask: float = 0.0
    scale: float = 1.0
    transform: str = "none"
    transform_param: float = 0.0
    compute_dtype: str = "float32"
    weights_dtype: str = "float32"
    jitter_eps: float = 0.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("score", self.score, SCORES),
            ("order", self.order, ORDERS),
            ("transform", self.transform, TRANSFORMS),
            ("bias_on", self.bias_on, ("none", "scores", "logits")),
            ("renorm_rule", self.renorm_rule, ("add", "clamp")),
            ("group_score", self.group_score, ("max", "sum_top2")),
        ):
            if value not in known:
                raise ValueError(f"GateSpec.{name} is {value!r}; known: {', '.join(known)}")
        if self.top_k < 1:
            raise ValueError(f"GateSpec.top_k is {self.top_k}; at least 1")

    def encode(self) -> str:
        """The spec as a canonical string: the form that an op in the graph carries. Defaults are left out."""
        given = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.default is dataclasses.MISSING or getattr(self, f.name) != f.default
        }
        return json.dumps(given, separators=(",", ":"), sort_keys=True)

    @classmethod
    def decode(cls, text: str) -> GateSpec:
        """The inverse of encode. Raises: ValueError, TypeError on unknown fields or values."""
        return cls(**json.loads(text))

    def apply(self, logits: Tensor, selection_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [T,E], selection_bias [E] or None -> weights f32[T,K] (rounded to weights_dtype), experts i32[T,K]."""
        compute = logits.dtype if self.compute_dtype == "logits" else getattr(torch, self.compute_dtype)
        weights, experts = self.route(logits.to(compute), selection_bias)
        rounded = logits.dtype if self.weights_dtype == "logits" else getattr(torch, self.weights_dtype)
        return weights.to(rounded).float(), experts.to(torch.int32)

    def route(self, logits: Tensor, selection_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As apply, all in the logits' own dtype and unrounded: [T, E] -> weights [T, K], experts i64[T, K]."""
        weights, experts = _route(self, self.transformed(logits), selection_bias)
        if self.renormalise:
            total = weights.sum(-1, keepdim=True)
            total = total.clamp(min=self.renorm_eps) if self.renorm_rule == "clamp" else total + self.renorm_eps
            weights = weights / total
        return (weights * self.scale if self.scale != 1.0 else weights), experts

    def transformed(self, logits: Tensor) -> Tensor:
        """The logits after the spec's transform, in their own dtype."""
        if self.transform == "std" and len(logits):  # of no rows, std() warns
            centred = logits - logits.mean(-1, keepdim=True)
            return centred / (logits.std(-1, keepdim=True) + self.transform_param)
        if self.transform == "temperature":
            return logits / self.transform_param
        if self.transform == "tanh_cap":
            return torch.tanh(logits / self.transform_param) * self.transform_param
        return logits


def top_k_stable(scores: Tensor, k: int) -> Tensor:
    """scores [.., E] -> i64[.., k], best first; equal scores in index order; NaN counts as the greatest."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def _score(name: str, logits: Tensor) -> Tensor:
    if name == "softmax":
        return logits.softmax(-1)
    return torch.sigmoid(logits) if name == "sigmoid" else logits


def _route(spec: GateSpec, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if spec.score == "sparsemixer":
        return _sparsemixer(spec, logits)
    scores = _score(spec.score, logits) if spec.order == "score_then_topk" else logits
    choice = scores
    if spec.bias_on != "none":
        if bias is None:
            raise ValueError(f"GateSpec.bias_on is {spec.bias_on!r} but the gate has no selection bias")
        choice = (logits if spec.bias_on == "logits" else scores) + bias.to(scores.dtype)
    if spec.num_groups > 1:
        choice = _mask_groups(spec, choice)
    experts = top_k_stable(choice, spec.top_k)
    chosen = scores.gather(-1, experts)
    return (chosen if spec.order == "score_then_topk" else _score(spec.score, chosen)), experts


def _mask_groups(spec: GateSpec, choice: Tensor) -> Tensor:
    grouped = choice.view(choice.shape[0], spec.num_groups, choice.shape[1] // spec.num_groups)  # [T, G, E/G]
    if spec.group_score == "max":
        score = grouped.amax(-1)
    else:
        score = grouped.gather(-1, top_k_stable(grouped, min(2, grouped.shape[-1]))).sum(-1)
    kept = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, top_k_stable(score, spec.groups_kept), True)
    return grouped.masked_fill(~kept.unsqueeze(-1), spec.group_mask).view_as(choice)


def _sparsemixer(spec: GateSpec, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Winner by winner: softmax over the logits within 2*eps of the best one, relative to the larger magnitude.

    Source: Phi-3.5-MoE; the weights of the K winners are not renormalised.
    """
    weights, experts = [], []
    rest = logits
    for _ in range(spec.top_k):
        best = rest.amax(-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * spec.jitter_eps
        winner = top_k_stable(rest, 1)
        weights.append(rest.masked_fill(far, float("-inf")).softmax(-1).gather(-1, winner))
        experts.append(winner)
        rest = rest.scatter(-1, winner, float("-inf"))
    return torch.cat(weights, -1), torch.cat(experts, -1)
