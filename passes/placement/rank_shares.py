"""What one rank holds, read from plan.json, in the numbers that graph passes need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from moec.passes.hardware.errors import PlacementError


@dataclass(frozen=True)
class Span:
    """Half-open range of heads, columns, or rows, of `total`."""

    start: int
    stop: int
    total: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class LayerShare:
    """One rank's part of a layer; None where the layer has no such tensor.

    Args:
        query_heads, kv_heads: heads; dense: columns of the dense or shared FFN.
        experts: resident experts in order; num_experts: of the layer; expert_columns: columns of each resident expert.
    """

    query_heads: Span
    kv_heads: Span
    dense: Span | None = None
    experts: tuple[int, ...] = ()
    num_experts: int = 0
    expert_columns: Span | None = None


@dataclass(frozen=True)
class RankShares:
    """One rank's part of a model under a plan of one stage and one attention lane."""

    rank: int
    num_ranks: int
    layers: tuple[LayerShare, ...]
    embedding: Span
    head: Span


def rank_shares(plan: Mapping[str, Any], rank: int) -> RankShares:
    """The shares of `rank` in a plan document.

    Raises:
        PlacementError: the plan has pipeline stages, attention lanes or copied experts, which the graph passes do not
            apply, or no such rank.
    """
    s = plan["certificate"]["plan"]
    ranks = s["expert_groups"] * s["expert_tp"]
    if s["stages"] != 1 or s["attention_tp"] != ranks or s["copies"]:
        raise PlacementError(
            f"plan {plan['strategy']}: the graph passes apply plans of one stage, one attention lane and no copied "
            "experts; "
            f"plan again with --strategy TP{ranks} or EP{ranks}"
        )
    if not 0 <= rank < ranks:
        raise PlacementError(f"plan {plan['strategy']}: no rank {rank}; a replica has ranks 0 to {ranks - 1}")
    units = [u for u in plan["units"] for _ in range(u["layers"])]
    classes = [c for c in plan["model"]["layers"] for _ in range(c["count"])]
    layers = tuple(_layer(one, u, c, s, rank) for one, u, c in zip(plan["layers"], units, classes, strict=True))
    return RankShares(rank, ranks, layers, _span(plan["embedding"], rank), _span(plan["head"], rank))


def _layer(
    layer: Mapping[str, Any], units: Mapping[str, Any], c: Mapping[str, Any], s: Mapping[str, Any], rank: int
) -> LayerShare:
    heads = _span(layer["attention"], rank, int(units["attention"]["query_heads"]))
    num_kv = c["attention"]["kv_heads"]
    per_kv = c["attention"]["heads"] // num_kv
    kv_heads = Span(heads.start // per_kv, -(-heads.stop // per_kv), num_kv)
    dense = _span(layer["dense"], rank, units["dense"]["width"]) if "dense" in units else None
    if "expert" not in units:
        return LayerShare(heads, kv_heads, dense)
    group, first = rank // s["expert_tp"], rank - rank % s["expert_tp"]
    blocks = layer["experts"][first : first + s["expert_tp"]]
    columns = _span(blocks, rank - first, units["expert"]["width"])
    experts = tuple(sorted(e for e, g, _ in layer["resident"] if g == group))
    return LayerShare(heads, kv_heads, dense, experts, c["moe"]["num_experts"], columns)


def _span(held: list[int], rank: int, size: int = 1) -> Span:
    ends = [0, *accumulate(held)]
    return Span(ends[rank] * size, ends[rank + 1] * size, ends[-1] * size)
