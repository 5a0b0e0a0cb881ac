"""Which GateSpecs give measured weights from logits: rules are enumerated, scale and eps are solved for."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moec.passes.ir.gate import GateSpec

TOLERANCE = 1e-9
MAX_GROUPED = 256  # experts up to which grouped selection is tried


@dataclasses.dataclass(frozen=True)
class Rule:
    """A spec and the leaf that holds its selection bias (None: none)."""

    spec: GateSpec
    bias: str | None

    def route(self, logits: Tensor, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """logits [T, E] -> weights [T, K], experts i64[T, K]. leaves: tensors of the block by name."""
        return self.spec.route(logits, None if self.bias is None else leaves[self.bias])


def fit(
    logits: Tensor, weights: Tensor, top_k: int, biases: Mapping[str, Tensor], literals: Mapping[float, str]
) -> list[Rule]:
    """All rules with route(logits) = weights (f64[P, E'] and f64[P, E], E <= E'); the plainest first.

    Groups are tried only where nothing else fits. literals: float numbers of the block (eps, caps), with their op.
    """
    for grouped in (False, True):
        found = []
        for spec, bias in _candidates(logits.shape[1], top_k, list(biases), literals, grouped):
            solved = _solve(spec, logits, weights, None if bias is None else biases[bias], literals)
            found += [Rule(s, bias) for s in solved]
        if found:
            return sorted(found, key=lambda r: r.spec.scale != 1.0)
    return []


def _candidates(
    num_experts: int, top_k: int, biases: list[str], literals: Mapping[float, str], grouped: bool
) -> Iterator[tuple[GateSpec, str | None]]:
    plain = GateSpec(top_k, compute_dtype="float64", weights_dtype="float64")
    if not grouped:
        for eps in sorted({0.01, *(v for v in literals if 0 < v < 1), *(v / 2 for v in literals if 0 < v < 1)}):
            yield dataclasses.replace(plain, score="sparsemixer", jitter_eps=eps), None
    caps = [v for v in literals if 1 < v <= 100]
    transforms = [("none", 0.0), ("std", 0.0), *(("tanh_cap", v) for v in caps)] if not grouped else [("none", 0.0)]
    for (transform, value), score in itertools.product(transforms, ("softmax", "sigmoid", "none")):
        base = dataclasses.replace(plain, score=score, transform=transform, transform_param=value)
        if not grouped:
            yield dataclasses.replace(base, order="topk_then_score"), None
        for bias, on in [(None, "none"), *itertools.product(biases, ("scores", "logits"))]:
            if not grouped:
                yield dataclasses.replace(base, bias_on=on), bias
                continue
            for groups in _groups(num_experts, top_k):
                yield dataclasses.replace(base, bias_on=on, **groups), bias


def _groups(num_experts: int, top_k: int) -> Iterator[dict]:
    for n in range(2, num_experts // 2 + 1) if num_experts <= MAX_GROUPED else ():
        for kept in range(1, n) if num_experts % n == 0 else ():
            if kept * (num_experts // n) >= top_k:
                for score, mask in itertools.product(("sum_top2", "max"), (-math.inf, 0.0)):
                    yield {"num_groups": n, "groups_kept": kept, "group_score": score, "group_mask": mask}


def _solve(
    spec: GateSpec, logits: Tensor, weights: Tensor, bias: Tensor | None, literals: Mapping[float, str]
) -> list[GateSpec]:
    """The spec with its scale, and with renormalisation, scale and eps: those that fit."""
    raw, chosen = spec.route(logits, bias)
    want = _chosen(weights, chosen)
    live = want != 0
    if not live.any() or int(live.sum()) != int((weights != 0).sum()) or not torch.isfinite(raw).all():
        return []
    found = []
    quotient = want[live] / raw[live]
    scale = quotient.median()
    if bool(((quotient / scale - 1).abs() <= TOLERANCE).all()):
        found.append(dataclasses.replace(spec, scale=_round(float(scale))))
    total = raw.sum(-1)
    expected = raw / total[:, None]
    if not found or not torch.allclose(total, total[:1], rtol=1e-9, atol=0):
        found += _renormalised(spec, raw, want, live, total, literals) if bool(torch.isfinite(expected).all()) else []
    return found


def _renormalised(
    spec: GateSpec, raw: Tensor, want: Tensor, live: Tensor, total: Tensor, literals: Mapping[float, str]
) -> list[GateSpec]:
    """want = raw * scale / (total + eps): total * want/raw is linear, so scale and eps follow from two moments."""
    quotient = torch.where(live, raw / torch.where(live, want, torch.ones_like(want)), torch.zeros_like(raw))
    inverse = quotient.sum(-1) / live.sum(-1).clamp_min(1)  # [P]: (total + eps) / scale
    rows = live.any(-1)
    x, y = total[rows], inverse[rows]
    spread = x - x.mean()
    slope = (spread * (y - y.mean())).sum() / spread.square().sum().clamp_min(1e-300) if len(x) > 1 else y[0] / x[0]
    scale = _round(float(1 / slope)) if spread.abs().max() > 1e-6 * x.abs().max() else _round(float((x / y).median()))
    eps = float((y * scale - x).median())
    eps = _near_literal(eps, literals) if abs(eps) > 1e-13 * float(x.abs().max()) else 0.0
    rule = "add"
    if eps == 0.0:
        eps, rule = _invisible(literals)
    solved = dataclasses.replace(spec, renormalise=True, renorm_eps=eps, renorm_rule=rule, scale=scale)
    fitted = total.clamp(min=eps) if rule == "clamp" else total + eps
    error = (raw * scale / fitted[:, None] - want).abs()[live] / want[live].abs()
    return [solved] if bool((error <= TOLERANCE).all()) else []


def _near_literal(eps: float, literals: Mapping[float, str]) -> float:
    near = [v for v in literals if abs(eps / v - 1) < 1e-3]
    return min(near, key=lambda v: abs(eps - v)) if near else eps


def _invisible(literals: Mapping[float, str]) -> tuple[float, str]:
    """A bound of the block's own that ordinary sums do not show; it keeps a sum of zero from giving NaN."""
    for value, op in literals.items():
        if 0 < value < 1e-3 and op.startswith("clamp"):
            return value, "clamp"
        if 0 < value < 1e-13 and op.startswith("add"):
            return value, "add"
    return 0.0, "add"


def _round(scale: float) -> float:
    return round(scale, 6) if scale and abs(round(scale, 6) / scale - 1) < TOLERANCE else scale


def _chosen(weights: Tensor, chosen: Tensor) -> Tensor:
    """Weights [P, E] of the chosen [P, K]; 0 for an index that is no expert here."""
    here = chosen < weights.shape[1]
    return weights.gather(1, chosen.clamp(max=weights.shape[1] - 1)) * here


def classes(
    rules: list[Rule], num_logits: int, leaves: Mapping[str, Tensor], generator: torch.Generator
) -> tuple[list[list[Rule]], Tensor]:
    """Rules that agree on 900 random logit rows form a class; and rows of logits on which classes differ."""
    scales = (0.5, 3.0, 12.0)
    logits = torch.cat([torch.randn(300, num_logits, generator=generator, dtype=torch.float64) * s for s in scales])
    groups: list[tuple[list[Rule], Tensor]] = []
    for rule in rules:
        weights, chosen = rule.route(logits, leaves)
        dense = torch.zeros_like(logits).scatter_(1, chosen, weights)
        same = next((g for g in groups if (dense - g[1]).abs().max() < 1e-7 * g[1].abs().max()), None)
        if same is None:
            groups.append(([rule], dense))
        else:
            same[0].append(rule)
    rows: set[int] = set()
    for _, dense in groups[1:]:
        rows.update((dense - groups[0][1]).abs().amax(1).topk(3).indices.tolist())
    return [g[0] for g in groups], logits[sorted(rows)[:200]]
