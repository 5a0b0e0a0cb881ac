"""Counts the slots of every layer's experts, and drops those beyond a capacity before anything is sent.

Before:  e = moec.experts(x, weights, chosen, ..)
After:   k = moec.limit_slots(chosen, weights, owner, E, owners, factor, layer); e = moec.experts(x, weights, k[0], ..)
Leaves alone: layers whose experts the plan does not place; without a capacity, layers without copied experts: nothing
         is dropped there, and nobody needs the counts.
Needs:   choose-strategy. options["limit-experts"] = Capacity; without it nothing is dropped.
Gives:   a count of slots per expert where copies may take other parts of the tokens while serving, or where slots may
         be dropped. The owner of a slot is its expert, or the group of ranks that serves it.
Source:  GShard (arXiv 2006.16668), section 2.2, for a capacity per expert, here with the weakest slots dropped and not
         the last; per device in docs/placement.md. Weights are not renormalised: a dropped slot's share is lost.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from moec.passes.hardware.errors import PlacementError
from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import call, calls
from moec.passes.ir import limit_ops  # noqa: F401  (registers torch.ops.moec.limit_slots)
from moec.passes.ir.copies import copy_of
from moec.passes.placement.capacity import check_factor
from moec.passes.placement.rank_shares import RankShares, Residency
from moec.passes.placing.choose_strategy import ChooseStrategy
from moec.passes.placing.exchange import chosen_groups, token_numbers

aten, moec = torch.ops.aten, torch.ops.moec
OWNERS = ("device", "expert")


@dataclass(frozen=True)
class Capacity:
    """factor: of the mean load of an owner, which may take so many slots of a batch. per: one of OWNERS.

    Raises: PlacementError: a factor of 0 or less, or another owner.
    """

    factor: float
    per: str = "device"

    def __post_init__(self) -> None:
        check_factor(self.factor)
        if self.per not in OWNERS:
            raise PlacementError(f"capacity per {self.per!r}; expected {' or '.join(OWNERS)}")


class LimitExperts:
    """See the module."""

    name = "limit-experts"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        capacity: Capacity | None = context.options.get(self.name)
        entries: list[Match | NoMatch] = []
        for node in [n for n in calls(gm, moec.experts.default) if "share" in n.meta]:
            residency = node.meta["share"].residency
            if residency is None:
                entries.append(NoMatch("the plan has no experts here", node.name, layer_of(node)))
            elif capacity is not None or residency.most_copies > 1:
                entries.append(_limit(gm, node, residency, capacity))
        ledger = Ledger.of(entries)
        return PassResult(gm, bool(ledger.matched), ledger)


def _limit(gm: GraphModule, node: Node, residency: Residency, capacity: Capacity | None) -> Match:
    g, num_experts = gm.graph, len(residency.copies)
    by_group = capacity is not None and capacity.per == "device"
    owners = 1 + max(residency.group_of_rank) if by_group else num_experts
    factor = 0.0 if capacity is None else capacity.factor
    with g.inserting_before(node):
        owner = call(g, aten.to.dtype, (node.args[2], torch.int64), like=node)
        if by_group:
            owner = chosen_groups(gm, residency, owner, token_numbers(gm, owner, node), node)
        counted = (node.args[2], node.args[1], owner, num_experts, owners, factor, layer_of(node) or 0)
        limited = call(g, moec.limit_slots.default, counted, like=node)
        kept = call(g, operator.getitem, (limited, 0), like=node)
    node.args = (*node.args[:2], kept, *node.args[3:])
    return Match(node.name, layer_of(node), f"{factor:g} of the mean of {owners}" if factor else "counted")


def limited(gm: GraphModule, shares: Sequence[RankShares], capacity: Capacity | None) -> GraphModule:
    """What the ranks together compute, as one graph: `gm` itself without a capacity, else a copy that drops the same
    slots. shares: one entry a rank."""
    if capacity is None:
        return gm
    whole = copy_of(gm)
    for one in [s for s in shares if s.place.stage_rank == 0]:  # each stage knows its own layers
        context = PassContext(options={ChooseStrategy.name: one, LimitExperts.name: capacity})
        ChooseStrategy().run(whole, context)
        LimitExperts().run(whole, context)
        for node in whole.graph.nodes:
            node.meta.pop("share", None)
    return whole
