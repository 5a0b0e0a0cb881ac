"""Folds chains of shape operations that keep the order of the elements: to nothing, or to one view.

Before:  a = unsqueeze(x, 0); b = transpose(view(a, [1, T, Q, D]), 1, 2); c = transpose(select(b, 0, 0), 0, 1)
After:   c = view(x, [T, Q, D])
Leaves alone: chains that reorder elements; a view that is one operation already; sizes that no earlier node gives.
Needs:   meta["val"].  Gives: no shape operation undoes another.
Source:  a chain is run on the numbers 0, 1, 2, ..: it keeps the order exactly when they come out in order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import call, is_call, remove_dead, replace, symbolic
from moec.passes.infra.verify import concrete, run

aten = torch.ops.aten
SHAPINGS = (
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.select.int,
    aten.slice.Tensor,
    aten.transpose.int,
    aten.permute.default,
    aten.flatten.using_ints,
    aten.expand.default,
    aten.alias.default,
)
LONGEST = 12  # a chain is looked at this far back


class FoldViews:
    """Shape operations that cancel go."""

    name = "fold-views"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        sizes: dict[Any, Node] = {}
        matched: list[Match] = []
        for node in list(gm.graph.nodes):
            if isinstance(node.meta.get("val"), torch.SymInt):
                sizes.setdefault(symbolic(node.meta["val"]), node)
            elif is_call(node, *SHAPINGS) and _fold(gm, node, sizes):
                matched.append(Match(node.name, layer_of(node)))
        if matched:
            remove_dead(gm)
        return PassResult(gm, bool(matched), Ledger(tuple(matched)))


def _fold(gm: GraphModule, node: Node, sizes: dict[Any, Node]) -> bool:
    """Replaces the longest chain that ends in `node` and keeps the order. Whether there was one."""
    chain = [node]
    while is_call(chain[0].args[0], *SHAPINGS) and len(chain) < LONGEST:
        chain.insert(0, chain[0].args[0])
    for start in range(len(chain)):
        steps, source = chain[start:], chain[start].args[0]
        if not _keeps_order(steps, source):
            continue
        if _shape(node) == _shape(source):
            return _remove(node, source)
        return len(steps) > 1 and _as_view(gm, node, source, sizes)
    return False


def _remove(node: Node, source: Node) -> bool:
    """`source` stands for `node` from now on; an output keeps its name, so `source` takes it. An input stays one."""
    if not any(u.op == "output" for u in node.users):
        node.replace_all_uses_with(source, propagate_meta=False)
        return True
    if source.op != "call_function":
        return False
    replace(node, source)
    return True


def _shape(node: Node) -> list[Any]:
    return [symbolic(n) for n in node.meta["val"].shape]


def _keeps_order(steps: list[Node], source: Node) -> bool:
    shape = [concrete(n) for n in source.meta["val"].shape]
    numbers = torch.arange(torch.Size(shape).numel())
    try:
        after = run(steps, {source: numbers.view(shape)}, steps[-1])
    except RuntimeError:  # a view that the operand's own strides allow, and dense ones do not
        return False
    return torch.equal(after.flatten(), numbers)


def _as_view(gm: GraphModule, node: Node, source: Node, sizes: dict[Any, Node]) -> bool:
    """Replaces `node` by one view of `source` where every size is known and the strides allow it."""
    shape = [n if isinstance(n, int) else sizes.get(n) for n in _shape(node)]
    if None in shape:
        return False
    with gm.graph.inserting_before(node):
        target = aten.view.default if source.meta["val"].is_contiguous() else aten.reshape.default
        replace(node, call(gm.graph, target, (source, shape), like=node))
    return True
