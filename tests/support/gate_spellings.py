"""Gates as people write them: `SPELLINGS[name] = (route, spec)`, route(m, logits) -> weights, experts.

m.bias [E] is a selection bias. Every gate chooses K of E experts; the spec is what lift-gate must read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.passes.ir.gate import GateSpec

E, K = 8, 2
Route = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


def mixtral(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = F.softmax(logits.float(), dim=1).topk(K, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), experts


def gemma4(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The factor of each expert is no part of the gate."""
    weights, experts = F.softmax(logits, dim=-1, dtype=torch.float32).topk(K, -1)
    weights /= weights.sum(-1, keepdim=True)
    return weights * m.bias.float()[experts], experts


def olmoe(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = F.softmax(logits, dim=-1, dtype=torch.float32).topk(K)
    return weights.to(logits.dtype), experts


def granite(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    top, experts = logits.float().topk(K, dim=1)
    return torch.softmax(top, 1).type_as(logits), experts


def gpt_oss(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    top, experts = torch.topk(logits, K, dim=-1)
    return F.softmax(top, dim=1, dtype=top.dtype), experts


def deepseek_v3(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.float().sigmoid()
    choice = scores + m.bias.unsqueeze(0)
    groups = choice.view(-1, 4, E // 4).topk(2, dim=-1)[0].sum(dim=-1)
    kept = torch.zeros_like(groups).scatter_(1, groups.topk(2, sorted=False)[1], 1)
    mask = kept.unsqueeze(-1).expand(-1, 4, E // 4).reshape(-1, E)
    experts = choice.masked_fill(~mask.bool(), float("-inf")).topk(K, sorted=False)[1]
    weights = scores.gather(1, experts)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, experts


def deepseek_v2(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(-1, dtype=torch.float32)
    best = scores.view(-1, 4, E // 4).max(-1).values
    mask = torch.zeros_like(best).scatter_(1, best.topk(2, sorted=False)[1], 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, E // 4).reshape(-1, E)
    weights, experts = scores.masked_fill(~mask.bool(), 0.0).topk(K, sorted=False)
    return weights * 16.0, experts


def minimax(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.sigmoid(logits.float())
    _, experts = torch.topk(scores + m.bias, K, dim=-1, sorted=False)
    weights = scores.gather(1, experts)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights, experts


def ernie(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    scores = F.softmax(logits.float(), dim=1)
    experts = torch.topk(scores + m.bias.view(1, E).squeeze(), K, dim=-1).indices
    weights = torch.gather(scores, -1, experts)
    return weights / torch.clamp(weights.sum(-1, keepdim=True), min=1e-3), experts


def bias_on_logits(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    experts = (logits + m.bias).topk(K)[1]
    return logits.gather(-1, experts).sigmoid(), experts


def sparsemixer(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    best, first = logits.max(dim=-1, keepdim=True)
    far = ((best - logits) / logits.abs().clamp(min=best)) > 2 * 0.01
    weight = torch.softmax(logits.masked_fill(far, float("-inf")), -1).gather(-1, first)
    rest = logits.scatter(-1, first, float("-inf"))
    best, second = rest.max(dim=-1, keepdim=True)
    far = ((best - logits) / logits.abs().clamp(min=best)) > 2 * 0.01
    other = torch.softmax(rest.masked_fill(far, float("-inf")), -1).gather(-1, second)
    return torch.cat((weight, other), -1), torch.cat((first, second), -1)


def llama4(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    top, experts = logits.topk(1, dim=-1)
    scores = torch.full_like(logits, float("-inf")).scatter_(1, experts, top).float().sigmoid()
    return scores.gather(1, experts), experts


def skywork(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    logits = logits / (logits.std(dim=1, keepdim=True) / 1.0)
    weights, experts = logits.softmax(1).topk(K)
    return weights / weights.sum(-1, keepdim=True), experts


def std_normalised(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    centred = logits - logits.mean(-1, keepdim=True)
    weights, experts = torch.softmax(centred / (logits.std(-1, keepdim=True) + 1e-6), -1).topk(K)
    return weights, experts


def grok(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = 30.0 * torch.tanh(logits.float() / 30.0)
    return F.softmax(logits, -1).topk(K)


def temperature(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = (logits.float() / 2.0).softmax(-1).topk(K)
    return weights / weights.sum(-1, keepdim=True), experts


def exponentials(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    exps = torch.exp(logits.float() - logits.float().amax(-1, keepdim=True))
    weights, experts = (exps / exps.sum(-1, keepdim=True)).topk(K)
    return weights, experts


def log_softmax(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    top, experts = F.log_softmax(logits.float(), -1).topk(K)
    return top.exp(), experts


def sorted_all(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    scores, order = torch.sort(logits.float().softmax(-1), dim=-1, descending=True)
    weights = scores[:, :K]
    return weights / weights.sum(-1, keepdim=True), order[:, :K]


def argsorted(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.sigmoid(logits.float())
    experts = torch.argsort(scores, dim=-1, descending=True)[:, :K]
    return torch.gather(scores, 1, experts), experts


def l1_norm(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = logits.softmax(-1).topk(K)
    return weights / torch.norm(weights, p=1, dim=-1, keepdim=True), experts


def normalize(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = logits.float().softmax(-1).topk(K)
    return F.normalize(weights, p=1.0, dim=-1), experts


def one_hot_weights(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.float().softmax(-1)
    experts = scores.topk(K)[1]
    picked = F.one_hot(experts, E).to(scores.dtype) * scores.unsqueeze(1)
    return picked.sum(-1), experts


def two_argmaxes(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.float().softmax(-1)
    first = scores.argmax(-1, keepdim=True)
    second = scores.scatter(-1, first, -1.0).argmax(-1, keepdim=True)
    experts = torch.cat([first, second], -1)
    return scores.gather(-1, experts), experts


def turned(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    columns = logits.float().t().softmax(0)  # [E, T]
    weights, experts = columns.topk(K, dim=0)
    return weights.t(), experts.t()


def reshaped(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.view(-1, 2, E // 2).float().flatten(1).unsqueeze(0).softmax(-1).squeeze(0)
    weights, experts = scores.topk(K, dim=-1)
    weights = weights.reshape(-1, 1, K).to(logits.dtype).float() / 1.0
    return weights.squeeze(1), experts.to(torch.int32).long()


def half_precision_scores(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = logits.to(torch.bfloat16).softmax(-1).topk(K)
    return weights, experts


def scaled_after_cast(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = logits.float().sigmoid().topk(K)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    return (weights * 1.5).to(logits.dtype), experts


SPELLINGS: dict[str, tuple[Route, GateSpec]] = {
    "mixtral": (mixtral, GateSpec(K, renormalise=True)),
    "gemma4": (gemma4, GateSpec(K, renormalise=True)),
    "olmoe": (olmoe, GateSpec(K)),
    "granite": (granite, GateSpec(K, order="topk_then_score")),
    "gpt_oss": (gpt_oss, GateSpec(K, order="topk_then_score")),
    "deepseek_v3": (
        deepseek_v3,
        GateSpec(
            K,
            "sigmoid",
            renormalise=True,
            renorm_eps=1e-20,
            bias_on="scores",
            num_groups=4,
            groups_kept=2,
            group_score="sum_top2",
            group_mask=float("-inf"),
            scale=2.5,
        ),
    ),
    "deepseek_v2": (deepseek_v2, GateSpec(K, num_groups=4, groups_kept=2, scale=16.0)),
    "minimax": (minimax, GateSpec(K, "sigmoid", renormalise=True, bias_on="scores")),
    "ernie": (ernie, GateSpec(K, renormalise=True, renorm_eps=1e-3, renorm_rule="clamp", bias_on="scores")),
    "bias_on_logits": (bias_on_logits, GateSpec(K, "sigmoid", bias_on="logits")),
    "sparsemixer": (sparsemixer, GateSpec(K, "sparsemixer", jitter_eps=0.01)),
    "llama4": (llama4, GateSpec(1, "sigmoid", "topk_then_score")),
    "skywork": (skywork, GateSpec(K, renormalise=True, transform="std")),
    "std_normalised": (std_normalised, GateSpec(K, transform="std", transform_param=1e-6)),
    "grok": (grok, GateSpec(K, transform="tanh_cap", transform_param=30.0)),
    "temperature": (temperature, GateSpec(K, renormalise=True, transform="temperature", transform_param=2.0)),
    "exponentials": (exponentials, GateSpec(K)),
    "log_softmax": (log_softmax, GateSpec(K)),
    "sorted_all": (sorted_all, GateSpec(K, renormalise=True)),
    "argsorted": (argsorted, GateSpec(K, "sigmoid")),
    "l1_norm": (l1_norm, GateSpec(K, renormalise=True)),
    "normalize": (normalize, GateSpec(K, renormalise=True, renorm_eps=1e-12, renorm_rule="clamp")),
    "one_hot_weights": (one_hot_weights, GateSpec(K)),
    "two_argmaxes": (two_argmaxes, GateSpec(K)),
    "turned": (turned, GateSpec(K)),
    "reshaped": (reshaped, GateSpec(K)),
    "half_precision_scores": (half_precision_scores, GateSpec(K, compute_dtype="bfloat16", weights_dtype="bfloat16")),
    "scaled_after_cast": (scaled_after_cast, GateSpec(K, "sigmoid", renormalise=True, renorm_eps=1e-6, scale=1.5)),
}
