"""Collectives in a graph: groups of ranks, issue and wait, and the one order that all ranks keep.

A collective is a call of `_c10d_functional` with the name of its group, and a `wait_tensor` that gives its value.
gm.meta["groups"] says which ranks a name means. isend and irecv number the ranks of their group of two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.errors import PassError
from moec.passes.infra.rewrite import call, is_call
from moec.passes.ir.text import DTYPES, size_text, symbol_letters
from moec.passes.placement.rank_shares import RankPlace

c10d = torch.ops._c10d_functional
CONSTANTS: dict[Any, tuple[str, ...]] = {
    c10d.all_reduce.default: ("reduce",),
    c10d.all_gather_into_tensor.default: (),
    c10d.all_to_all_single.default: (),
    c10d.isend.default: ("to",),
    c10d.irecv.default: ("source",),
}
"""Every collective that a graph may issue, with the names of the constants after its operand that a program keeps."""
ISSUED = tuple(CONSTANTS)
WAIT = c10d.wait_tensor.default


@dataclass(frozen=True)
class Group:
    """Ranks that run a collective together, in order."""

    name: str
    ranks: tuple[int, ...]


def stage_group(place: RankPlace) -> Group:
    """All ranks of a pipeline stage."""
    return Group(f"stage-{place.stage_ranks[0]}", place.stage_ranks)


def lane_group(place: RankPlace) -> Group:
    """The ranks that attend to the same sequences; the stage's own group where that is all of them."""
    if place.lanes == 1:
        return stage_group(place)
    return Group(f"lane-{place.lane_ranks[0]}", place.lane_ranks)


def pair_group(sender: int, receiver: int) -> Group:
    """A rank of one stage and its successor in the next."""
    return Group(f"pair-{sender}-{receiver}", (sender, receiver))


def groups_of(gm: GraphModule) -> dict[str, tuple[int, ...]]:
    """The ranks of each group that the graph's collectives name."""
    return gm.meta.setdefault("groups", {})


def issue(gm: GraphModule, target: Any, args: tuple[Any, ...], group: Group, like: Node) -> Node:
    """Starts a collective at the graph's insertion point."""
    groups_of(gm)[group.name] = group.ranks
    return call(gm.graph, target, (*args, group.name), like=like)


def wait(gm: GraphModule, issued: Node, like: Node) -> Node:
    """The value of a collective, at the graph's insertion point."""
    return call(gm.graph, WAIT, (issued,), like=like)


def group_name(node: Node) -> str:
    """The group of a collective that is_call(node, *ISSUED)."""
    return str(node.args[-1])


@dataclass(frozen=True)
class Collective:
    """One collective of a rank's graph. shape: of the operand; letters are sizes known when it runs."""

    op: str
    group: str
    dtype: str
    shape: tuple[str, ...]
    node: str
    layer: int | None


def collectives(gm: GraphModule) -> tuple[Collective, ...]:
    """The graph's collectives in the order in which it issues them."""
    letters = symbol_letters(gm)
    out = []
    for node in gm.graph.nodes:
        if is_call(node, *ISSUED):
            operand = node.args[0].meta["val"]
            shape = tuple(size_text(n, letters) for n in operand.shape)
            name = node.target._schema.name.split("::")[1]
            out.append(
                Collective(name, group_name(node), DTYPES[operand.dtype], shape, node.name, node.meta.get("layer"))
            )
    return tuple(out)


def check_order(graphs: Sequence[GraphModule]) -> None:
    """Every two ranks issue the collectives that they share in one order, with operands of one type.

    Raises:
        PassError: they do not; the message names the group, the place in the order and the ranks.
    """
    orders = [collectives(g) for g in graphs]
    groups: dict[str, tuple[int, ...]] = {}
    for rank, graph in enumerate(graphs):
        for name, ranks in groups_of(graph).items():
            if groups.setdefault(name, ranks) != ranks or rank not in ranks:
                raise PassError(f"place: rank {rank} takes group {name} for {ranks}, others for {groups[name]}")
    for name, ranks in groups.items():
        first, *others = ([_shared(c) for c in orders[r] if c.group == name] for r in ranks)
        for rank, other in zip(ranks[1:], others, strict=True):
            if other != first:
                at = next((i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), None)
                where = f"collective {at}" if at is not None else f"{len(first)} and {len(other)} collectives"
                raise PassError(
                    f"place: ranks {ranks[0]} and {rank} disagree on the order of collectives of {name}: {where}"
                )


def _shared(c: Collective) -> tuple[Any, ...]:
    """What a collective must have in common on all ranks of its group: a send is the other side's receive."""
    return ("transfer" if c.op in ("isend", "irecv") else c.op, c.dtype, c.shape)


def order_hash(graphs: Sequence[GraphModule]) -> str:
    """sha256 of every rank's collectives and groups: equal where all ranks run the programs of one placement."""
    content = [[[asdict(c) for c in collectives(g)], sorted(groups_of(g).items())] for g in graphs]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
