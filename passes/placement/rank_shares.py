"""What one rank holds, read from plan.json, in the numbers that graph passes need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
        """How many it holds."""
        return self.stop - self.start

    @property
    def is_first(self) -> bool:
        """Whether this is the share that begins a copy: it carries what must be added once, such as a bias."""
        return self.start == 0 < self.stop


@dataclass(frozen=True)
class Residency:
    """Where the experts of a layer live, the same on every rank of a stage.

    Args:
        copies: per expert, its (expert group, part of its tokens), the parts summing to 1.
        group_of_rank: per rank of the stage, its expert group; -1 for a rank that holds no columns of any expert.
    """

    copies: tuple[tuple[tuple[int, float], ...], ...]
    group_of_rank: tuple[int, ...]

    def held(self, group: int) -> tuple[int, ...]:
        """The experts that a group holds, in order."""
        return tuple(e for e, copies in enumerate(self.copies) if any(g == group for g, _ in copies))

    @property
    def most_copies(self) -> int:
        """1 where no expert is held twice."""
        return max(map(len, self.copies))


@dataclass(frozen=True)
class LayerShare:
    """One rank's part of a layer; None where the layer has no such tensor.

    Args:
        query_heads: heads. kv_heads: the key/value heads that the rank caches, in order, one more than once where its
            query heads share two of them unevenly; num_kv_heads: of the layer.
        dense: columns of the dense or shared FFN.
        residency, expert_columns: of the routed experts; the columns are those of each expert that the rank's group
            holds.
    """

    query_heads: Span
    kv_heads: tuple[int, ...]
    num_kv_heads: int
    dense: Span | None = None
    residency: Residency | None = None
    expert_columns: Span | None = None


@dataclass(frozen=True)
class RankPlace:
    """Where a rank stands. Ranks are numbered within a replica.

    Args:
        stage_ranks: the ranks of its pipeline stage. lane_ranks: those that attend to the same sequences.
        cuts: stage boundaries in layers.
    """

    rank: int
    stage: int
    cuts: tuple[int, ...]
    stage_ranks: tuple[int, ...]
    lane_ranks: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        """Pipeline stages of a replica."""
        return len(self.cuts) - 1

    @property
    def lanes(self) -> int:
        """Groups of ranks of the stage that attend to different sequences."""
        return len(self.stage_ranks) // len(self.lane_ranks)

    @property
    def lane(self) -> int:
        """The number of its lane in the stage."""
        return self.stage_ranks.index(self.rank) // len(self.lane_ranks)

    @property
    def lane_rank(self) -> int:
        """The rank's number in its lane."""
        return self.lane_ranks.index(self.rank)

    @property
    def stage_rank(self) -> int:
        """The rank's number in its stage."""
        return self.stage_ranks.index(self.rank)

    @property
    def is_first(self) -> bool:
        """Whether its stage begins with the embedding."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether its stage ends with the output projection."""
        return self.stage == self.num_stages - 1


@dataclass(frozen=True)
class RankShares:
    """One rank's part of a model.

    layers: None for layers of other stages. embedding, head: None where another stage holds it. vocabulary: the rows
    that each rank of the lane holds, in order.
    """

    place: RankPlace
    layers: tuple[LayerShare | None, ...]
    embedding: Span | None
    head: Span | None
    vocabulary: tuple[int, ...]


def num_ranks(plan: Mapping[str, Any]) -> int:
    """Ranks of one replica of a plan document."""
    s = plan["certificate"]["plan"]
    return int(s["stages"] * s["expert_groups"] * s["expert_tp"])


def rank_shares(plan: Mapping[str, Any], rank: int) -> RankShares:
    """The shares of `rank` of a replica in a plan document.

    Raises:
        PlacementError: no such rank.
    """
    s = plan["certificate"]["plan"]
    if not 0 <= rank < num_ranks(plan):
        raise PlacementError(f"plan {plan['strategy']}: no rank {rank}; a replica has ranks 0 to {num_ranks(plan) - 1}")
    place = _place(plan, s, rank)
    units = [u for u in plan["units"] for _ in range(u["layers"])]
    classes = [c for c in plan["model"]["layers"] for _ in range(c["count"])]
    inside = range(place.cuts[place.stage], place.cuts[place.stage + 1])
    layers = tuple(
        _layer(one, u, c, s, place) if i in inside else None
        for i, (one, u, c) in enumerate(zip(plan["layers"], units, classes, strict=True))
    )
    embedding = _span(plan["embedding"], rank, place.lane_ranks) if place.is_first else None
    head = _span(plan["head"], rank, place.lane_ranks) if place.is_last else None
    rows = tuple(plan["head"][r] for r in place.lane_ranks)
    return RankShares(place, layers, embedding, head, rows)


def _place(plan: Mapping[str, Any], s: Mapping[str, Any], rank: int) -> RankPlace:
    size, tp = s["expert_groups"] * s["expert_tp"], s["attention_tp"]
    stage, lane = rank - rank % size, rank - rank % tp
    stage_ranks, lane_ranks = tuple(range(stage, stage + size)), tuple(range(lane, lane + tp))
    return RankPlace(rank, rank // size, tuple(plan["cuts"]), stage_ranks, lane_ranks)


def _layer(
    layer: Mapping[str, Any], units: Mapping[str, Any], c: Mapping[str, Any], s: Mapping[str, Any], place: RankPlace
) -> LayerShare:
    held = _span(layer["attention"], place.rank, place.lane_ranks)
    attention, num_kv = units["attention"], c["attention"]["kv_heads"]
    per_unit = int(attention["query_heads"])
    heads = Span(held.start * per_unit, held.stop * per_unit, held.total * per_unit)
    share = LayerShare(heads, _kv_heads(held, attention["units"] // num_kv), num_kv)
    if "dense" in units:
        share = replace(share, dense=_span(layer["dense"], place.rank, place.lane_ranks, units["dense"]["width"]))
    if "expert" not in units:
        return share
    tp = s["expert_tp"]
    first = place.rank - place.rank % tp
    columns = _span(layer["experts"], place.rank, tuple(range(first, first + tp)), units["expert"]["width"])
    groups = tuple(i // tp if layer["experts"][r] else -1 for i, r in enumerate(place.stage_ranks))
    copies: list[list[tuple[int, float]]] = [[] for _ in range(c["moe"]["num_experts"])]
    for expert, group, part in layer["resident"]:
        copies[expert].append((group, part))
    residency = Residency(tuple(tuple(sorted(one)) for one in copies), groups)
    return replace(share, residency=residency, expert_columns=columns)


def _kv_heads(units: Span, parts: int) -> tuple[int, ...]:
    """The key/value heads of units that are each a part of one head's queries; each once where that divides evenly."""
    heads = [unit // parts for unit in range(units.start, units.stop)]
    once = sorted(set(heads))
    return tuple(once if len({heads.count(h) for h in once}) == 1 else heads)


def _span(held: list[int], rank: int, ranks: tuple[int, ...], size: int = 1) -> Span:
    """The share of `rank` among the ranks that hold one copy, in items of which a unit has `size`."""
    ends = [0, *accumulate(held[r] for r in ranks)]
    at = ranks.index(rank)
    return Span(ends[at] * size, ends[at + 1] * size, ends[-1] * size)
