"""Makes values whole again: sums of parts, joined logits, and the way of tokens to their experts and back.

Before:  y = aten.linear(a, wo_part)                                       meta["partial"]
After:   r = _c10d_functional.all_reduce(y, "sum", "lane-0"); s = _c10d_functional.wait_tensor(r)
Before:  l = aten.linear(x, head_part) [T, P]                              meta["gathered"]
After:   all_gather_into_tensor and wait, [R*T, P] -> [T, V] without the padding
Before:  e = moec.experts(x, weights, chosen, ..)                          meta["exchanged"]
After:   all_to_all_single of numbers of rows, of rows and of routes; moec.experts over what arrived; all_to_all_single
         back, and a sum (exchange.py)
Leaves alone: a partial sum whose only reader adds another partial sum: the sum of both is reduced once.
Needs:   shard-weights.
Gives:   every value that is not between a cut weight and its wait is whole on every rank; ranks that share a collective
         issue it in the same order.
Source:  Megatron-LM (arXiv 1909.08053), section 3; GShard (arXiv 2006.16668) for the all-to-all.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import call, fake_value, is_call, remove_dead
from moec.passes.ir.experts_call import ExpertsCall
from moec.passes.placement.rank_shares import RankPlace, RankShares, Residency
from moec.passes.placing.collectives import Group, c10d, issue, lane_group, stage_group, wait
from moec.passes.placing.exchange import Exchange, insert_exchange

aten = torch.ops.aten


class InsertCollectives:
    """See the module."""

    name = "insert-collectives"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        shares: RankShares | None = context.options.get("choose-strategy")
        entries: list[Match | NoMatch] = []
        for node in list(gm.graph.nodes) if shares else ():
            at, marks = node, node.meta
            residency, rows = marks.pop("exchanged", None), marks.pop("gathered", None)
            if residency is not None:
                at = _exchange(gm, node, residency, shares.place)
                entries.append(Match(at.name, layer_of(node), f"tokens of {shares.place.lanes} lanes, all-to-all"))
            if rows is not None:
                entries.append(_gather(gm, node, rows, lane_group(shares.place)))
            if marks.pop("partial", False) and len(shares.place.lane_ranks) > 1:
                entries.append(_whole(gm, at, lane_group(shares.place)))
        ledger = Ledger.of(entries)
        if ledger.matched:
            remove_dead(gm)
        return PassResult(gm, bool(ledger.matched), ledger)


def _whole(gm: GraphModule, node: Node, group: Group) -> Match | NoMatch:
    """Reduces a partial sum, or leaves that to the sum of two."""
    later = _sum_of_parts(node)
    if later is None:
        return _reduce(gm, node, group)
    later.meta["partial"] = True
    reason = f"{later.name} adds it to another partial sum, which is reduced once"
    return NoMatch(reason, node.name, layer_of(node))


def _sum_of_parts(node: Node) -> Node | None:
    """The node's only reader where that adds it to another value that is partial and read nowhere else."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or not is_call(user, aten.add.Tensor) or user.kwargs:
        return None
    if user.meta.get("partial"):  # the other operand came first and handed its mark on
        return user
    other = next((a for a in user.args if isinstance(a, Node) and a is not node), None)
    return user if other is not None and other.meta.get("partial") and len(other.users) == 1 else None


def _reduce(gm: GraphModule, node: Node, group: Group) -> Match:
    users = list(node.users)
    with gm.graph.inserting_before(node.next):
        reduced = issue(gm, c10d.all_reduce.default, (node, "sum"), group, node)
        whole = wait(gm, reduced, node)
    for user in users:
        user.replace_input_with(node, whole)
    return Match(reduced.name, layer_of(node), f"sum of {node.name} over {len(group.ranks)} ranks")


def _gather(gm: GraphModule, node: Node, rows: tuple[int, ...], group: Group) -> Match:
    """[T, P] of every rank -> [T, V]: each rank's first rows[r] columns, side by side."""
    users, g, most = list(node.users), gm.graph, max(rows)
    with g.inserting_before(node.next):
        gathered = issue(gm, c10d.all_gather_into_tensor.default, (node, len(rows)), group, node)
        tokens = call(g, aten.sym_size.int, (node, 0), like=node)
        sizes = [len(rows), tokens, most]
        stacked = call(g, aten.view.default, (wait(gm, gathered, node), sizes), like=node)  # [R, T, P]
        parts = [call(g, aten.select.int, (stacked, 0, r), like=node) for r in range(len(rows))]
        parts = [call(g, aten.slice.Tensor, (p, -1, 0, n), like=node) for p, n in zip(parts, rows, strict=True)]
        whole = call(g, aten.cat.default, (parts, -1), like=node)
    for user in users:
        user.replace_input_with(node, whole)
    _widen_readers(whole)
    padding = sum(most - n for n in rows)
    return Match(gathered.name, layer_of(node), f"{list(accumulate(rows))[-1]} columns, {padding} of padding")


def _widen_readers(whole: Node) -> None:
    """Fake values of all that follows from joined logits (a multiplier, a cap): they were those of a part."""
    changed, at = {whole}, whole.next
    while at.op != "output":
        if at.op == "call_function" and any(p in changed for p in at.all_input_nodes):
            at.meta["val"] = fake_value(at.target, at.args, dict(at.kwargs))
            changed.add(at)
        at = at.next


def _exchange(gm: GraphModule, node: Node, residency: Residency, place: RankPlace) -> Node:
    """Writes the exchange of a layer's tokens; the result stands for the experts' and is partial in a lane of several
    ranks, each of which sends its own share of the lane's tokens."""
    users = list(node.users)
    e = Exchange(
        ExpertsCall.of(node), residency, place.stage_rank, stage_group(place), place.lane_rank, len(place.lane_ranks)
    )
    total = insert_exchange(gm, [e], node, node)
    for user in users:
        user.replace_input_with(node, total)
    return total
