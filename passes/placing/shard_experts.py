"""Cuts routed experts, and dense or shared FFNs, to the experts and the columns that a rank holds."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.rewrite import call
from moec.passes.ir.experts_call import ExpertsCall
from moec.passes.ir.weights import weight_of
from moec.passes.placement.rank_shares import RankPlace, Residency, Span
from moec.passes.placing.exchange import chosen_groups, local_numbers, token_numbers
from moec.passes.placing.weight_parts import cut, gate_up_ranges, runs

aten = torch.ops.aten


def shard_experts(gm: GraphModule, node: Node, residency: Residency, columns: Span, place: RankPlace) -> str:
    """Cuts the stacks. Where all ranks hold every token, slots of other ranks' experts are numbered beyond the last,
    which adds nothing; else meta["exchanged"] says where tokens must travel. Returns why it cannot."""
    a, group = ExpertsCall.of(node), residency.group_of_rank[place.stage_rank]
    if a.num_shared:
        return "shared experts are stacked behind the routed ones; place before that"
    if a.transposed or a.interleaved:
        return "the expert weights are not in canonical layout"
    stacks = (a.w_gate_up, a.w_down, a.b_gate_up, a.b_down)
    if any(w is not None and weight_of(gm, w) is None for w in stacks):
        return "an expert weight is computed in the graph"
    if place.lanes > 1:
        node.meta["exchanged"] = residency
    elif group < 0:
        zero_part(gm, node)
        return ""
    if group >= 0:
        held = residency.held(group)
        if place.lanes == 1 and (len(held) < a.num_routed or residency.most_copies > 1):
            _number_locally(gm, node, residency, group)
        _cut_stacks(gm, node, a, held, columns)
    node.meta["partial"] = True
    return ""


def _cut_stacks(gm: GraphModule, node: Node, a: ExpertsCall, held: tuple[int, ...], columns: Span) -> None:
    """Rewrites the call's weights; the output bias goes with the first columns."""
    experts, kept = runs(held), [(columns.start, columns.stop)]
    both = gate_up_ranges(columns, a.act)
    w_in = cut(gm, cut(gm, a.w_gate_up, 0, experts, node), 1, both, node)
    w_out = cut(gm, cut(gm, a.w_down, 0, experts, node), 2, kept, node)
    b_in = None if a.b_gate_up is None else cut(gm, cut(gm, a.b_gate_up, 0, experts, node), 1, both, node)
    b_out = cut(gm, a.b_down, 0, experts, node) if a.b_down is not None and columns.is_first else None
    node.args = (*node.args[:3], w_in, w_out, b_in, b_out, *node.args[7:])


def _number_locally(gm: GraphModule, node: Node, residency: Residency, group: int) -> None:
    """The call's experts [T, K] as numbers in this rank's stacks; a copied expert serves the slots that fall to it."""
    g, num_experts = gm.graph, len(residency.copies)
    with g.inserting_before(node):
        chosen = call(g, aten.to.dtype, (node.args[2], torch.int64), like=node)
        if residency.most_copies > 1:
            groups = chosen_groups(gm, residency, chosen, token_numbers(gm, chosen, node), node)
            elsewhere = call(g, aten.ne.Scalar, (groups, group), like=node)
            chosen = call(g, aten.masked_fill.Scalar, (chosen, elsewhere, num_experts), like=node)
        local = local_numbers(gm, chosen, residency.held(group), num_experts, node)
    node.args = (*node.args[:2], local, *node.args[3:])


def shard_mlp(gm: GraphModule, node: Node, span: Span) -> str:
    """Cuts a dense or shared FFN to some of its columns. Returns why it cannot."""
    x, w_in, w_out, b_in, b_out, act = node.args
    if any(w is not None and weight_of(gm, w) is None for w in (w_in, w_out, b_in, b_out)):
        return "a weight of the dense FFN is computed in the graph"
    if not span.size:
        zero_part(gm, node)
        return ""
    both, kept = gate_up_ranges(span, act), [(span.start, span.stop)]
    new_b_in = None if b_in is None else cut(gm, b_in, 0, both, node)
    cuts = (cut(gm, w_in, 0, both, node), cut(gm, w_out, 1, kept, node))
    node.args = (x, *cuts, new_b_in, b_out if span.is_first else None, act)
    node.meta["partial"] = True
    return ""


def zero_part(gm: GraphModule, node: Node) -> None:
    """Zeros in the place of what this rank holds no part of."""
    users = list(node.users)
    with gm.graph.inserting_before(node):
        zero = call(gm.graph, aten.zeros_like.default, (node.args[0],), like=node)
    for user in users:
        user.replace_input_with(node, zero)
    zero.meta["partial"] = True
