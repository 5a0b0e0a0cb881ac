"""Joins projections of one value: their weights are stacked lazily, one product gives all of them.

Before:  q = aten.linear(x, wq); k = aten.linear(x, wk); v = aten.linear(x, wv)
After:   p = aten.linear(x, concat([wq, wk, wv], 0)); q, k, v = split_with_sizes(p, ..)          (views, no copies)
Leaves alone: a projection that shares its input with no other; computed weights; a bias in some of them only; unlike
         dtypes.
Needs:   fuse-gate-up (it takes the projections of dense FFNs first).  Gives: one product per value that is projected.
Source:  the usual QKV packing; DeepSeek's two down-projections of one input are the same case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import argument, call, call_many, calls, remove_dead, replace
from moec.passes.ir.weights import concat, weight_node, weight_of, weights_of

aten = torch.ops.aten


class FuseQkv:
    """Projections of one value become one product."""

    name = "fuse-qkv"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        sharing: dict[Node, list[Node]] = {}
        for linear in calls(gm, aten.linear.default):
            sharing.setdefault(linear.args[0], []).append(linear)
        entries: list[Match | NoMatch] = []
        for group in sharing.values():
            if len(group) > 1:
                reason = _why_not(gm, group)
                first = group[0]
                entries.append(NoMatch(reason, first.name, layer_of(first)) if reason else _fuse(gm, group))
        changed = any(isinstance(e, Match) for e in entries)
        if changed:
            remove_dead(gm)
        return PassResult(gm, changed, Ledger.of(entries))


def _why_not(gm: GraphModule, group: Sequence[Node]) -> str | None:
    names = ", ".join(n.name for n in group)
    weights = [weight_of(gm, n.args[1]) for n in group]
    biases = [argument(n, 2, "bias") for n in group]
    if any(w is None for w in weights) or any(b is not None and weight_of(gm, b) is None for b in biases):
        return f"a weight of {names} is computed in the graph"
    if any(b is None for b in biases) and any(b is not None for b in biases):
        return f"only some of {names} have a bias"
    if len({w.dtype for w in weights if w is not None}) > 1:
        return f"the weights of {names} differ in dtype"
    return None


def _fuse(gm: GraphModule, group: Sequence[Any]) -> Match:
    first = group[0]
    x, layer = first.args[0], layer_of(first)
    sizes = [int(n.meta["val"].shape[-1]) for n in group]
    with gm.graph.inserting_before(first):
        args = [x, _joined(gm, [n.args[1] for n in group])]
        biases = [argument(n, 2, "bias") for n in group]
        if biases[0] is not None:
            args.append(_joined(gm, biases))
        packed = call(gm.graph, aten.linear.default, tuple(args), like=first)
        parts = call_many(gm.graph, aten.split_with_sizes.default, (packed, sizes, -1), like=first)
    for old, new in zip(group, parts, strict=True):
        replace(old, new)
    return Match(packed.name, layer, f"{', '.join(p.name for p in parts)}: {sizes}")


def _joined(gm: GraphModule, nodes: Sequence[Node]) -> Node:
    weights = [weights_of(gm)[str(n.target)] for n in nodes]
    return weight_node(gm, f"{nodes[0].target}_packed", concat(weights, 0))
