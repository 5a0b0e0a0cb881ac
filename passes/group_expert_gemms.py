"""Turns moec::experts into what kernels serve: dispatch, one grouped product per projection, weighted combine.

Before:
    experts: bf16[T, 32] = moec.experts(x, weights, chosen, w_gate_up, w_down, None, None, None, "silu")
After:
    dispatch: (i32[2*T], i32[9]) = moec.dispatch(chosen, 8)
    grouped_gemm: bf16[2*T, 48] = moec.grouped_gemm(x, w_gate_up, None, order, start, None, 2, "silu")
    slots: f32[2*T] = aten.flatten.using_ints(weights)
    experts: bf16[T, 32] = moec.combine_gemm(grouped_gemm, w_down, None, order, start, slots, 2)

Slot t*(K+s)+k is token t's k-th expert; the s shared experts stacked behind the routed ones come last, with weight 1 or
their own gate's.

Leaves alone: weights that are not in canonical layout.
Needs: stack-expert-weights.  Gives: no moec::experts.
Source: design.md section 3.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import call, call_many, calls, is_call, replace
from moec.passes.ir.experts_call import ExpertsCall

aten, moec = torch.ops.aten, torch.ops.moec


@dataclasses.dataclass(frozen=True)
class GroupExpertGemms:
    """See the module."""

    name: str = "group-expert-gemms"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        entries: list[Match | NoMatch] = []
        for node in calls(gm, moec.experts.default):
            site = ExpertsCall.of(node)
            reason = check(site)
            if reason:
                entries.append(NoMatch(reason, node.name, layer_of(node)))
                continue
            detail = f"{site.num_routed} experts, {site.num_shared} shared, {site.act}"
            entries.append(Match(node.name, layer_of(node), detail))
            rewrite(gm, node, site)
        ledger = Ledger.of(entries)
        return PassResult(gm, bool(ledger.matched), ledger)


def check(site: ExpertsCall) -> str:
    """Why these experts cannot be grouped; "" where they can."""
    if site.transposed or site.interleaved:
        return "the expert weights are not in canonical layout; stack-expert-weights refused them"
    return ""


def rewrite(gm: GraphModule, node: Node, site: ExpertsCall) -> None:
    """Replaces one call; the combine takes over its name."""
    graph, per_token = gm.graph, site.top_k + site.num_shared
    with graph.inserting_before(node):
        args: tuple = (narrow(site.experts), site.num_routed, *([site.num_shared] if site.num_shared else []))
        order, start = call_many(graph, moec.dispatch.default, args, like=node)
        slots = slot_weights(gm, node, site)
        on_input, on_output = (slots, None) if site.weight_on_input else (None, slots)
        args = (site.x, site.w_gate_up, site.b_gate_up, order, start, on_input, per_token, site.act)
        h = call(graph, moec.grouped_gemm.default, args, like=node)
        args = (h, site.w_down, site.b_down, order, start, on_output, per_token)
        y = call(graph, moec.combine_gemm.default, args, like=node)
    replace(node, y)


def narrow(experts: Node) -> Node:
    """The gate's own i32 indices where the graph widened them for ATen; dispatch takes both."""
    widened = is_call(experts, aten.to.dtype) and experts.args[0].meta["val"].dtype == torch.int32  # type: ignore[union-attr]
    return experts.args[0] if widened else experts  # type: ignore[return-value]


def slot_weights(gm: GraphModule, node: Node, site: ExpertsCall) -> Node:
    """weights [T, K] and those of the shared experts -> [S] by slot id."""
    weights = site.weights
    if site.num_shared:
        if site.shared_weight is None:
            first = call(gm.graph, aten.slice.Tensor, (weights, 1, 0, 1), like=node)
            shared = call(gm.graph, aten.ones_like.default, (first,), like=node)
        else:
            shared = call(gm.graph, aten.unsqueeze.default, (site.shared_weight, 1), like=node)
        if shared.meta["val"].dtype != weights.meta["val"].dtype:
            shared = call(gm.graph, aten.to.dtype, (shared, weights.meta["val"].dtype), like=node)
        weights = call(gm.graph, aten.cat.default, ([weights, *[shared] * site.num_shared], 1), like=node)
    return call(gm.graph, aten.flatten.using_ints, (weights,), like=node)
