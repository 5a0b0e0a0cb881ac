"""Cuts the embedding and the output projection to the vocabulary rows that a rank holds."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.rewrite import argument, call
from moec.passes.ir.weights import weight_of
from moec.passes.placement.rank_shares import RankShares, Span
from moec.passes.placing.weight_parts import cut

aten = torch.ops.aten


def shard_embedding(gm: GraphModule, node: Node, span: Span) -> str:
    """Rows outside the span read another row and are set to zero; ranks add up. Returns why it cannot."""
    if weight_of(gm, node.args[0]) is None:
        return "an embedding whose weights are computed in the graph"
    tokens, dtype = node.args[1], node.meta["val"].dtype
    rows = cut(gm, node.args[0], 0, [(span.start, span.stop)], node)
    users = list(node.users)
    with gm.graph.inserting_before(node):
        shifted = call(gm.graph, aten.sub.Tensor, (tokens, span.start), like=node)
        clamped = call(gm.graph, aten.clamp.default, (shifted, 0, span.size - 1), like=node)
        inside = call(gm.graph, aten.eq.Tensor, (shifted, clamped), like=node)
        looked = call(gm.graph, aten.embedding.default, (rows, clamped), like=node)
        mask = call(gm.graph, aten.unsqueeze.default, (inside, -1), like=node)
        mask = call(gm.graph, aten.to.dtype, (mask, dtype), like=node)
        masked = call(gm.graph, aten.mul.Tensor, (looked, mask), like=node)
    for user in users:
        user.replace_input_with(node, masked)
    masked.meta["partial"] = True
    return ""


def shard_head(gm: GraphModule, node: Node, shares: RankShares) -> str:
    """Rows of the output projection, padded to the most that a rank of the lane holds. Returns why it cannot.

    The output is padded and not the weight, so that a tied embedding is stored once.
    """
    span, most = shares.head, max(shares.vocabulary)
    bias = argument(node, 2, "bias")
    if span is None or weight_of(gm, node.args[1]) is None or (bias is not None and weight_of(gm, bias) is None):
        return "an output projection with computed weights"
    kept = [(span.start, span.stop)]
    parts = [cut(gm, w, 0, kept, node) for w in (node.args[1], bias) if w is not None]
    users = list(node.users)
    with gm.graph.inserting_before(node):
        part = call(gm.graph, aten.linear.default, (node.args[0], *parts), like=node)
        if span.size < most:
            part = _padded(gm, part, most - span.size)
    part.meta["gathered"] = shares.vocabulary
    for user in users:
        user.replace_input_with(node, part)
    return ""


def _padded(gm: GraphModule, node: Node, count: int) -> Node:
    """[T, P] with columns of zeros behind; of operations whose shape functions keep T symbolic."""
    column = call(gm.graph, aten.slice.Tensor, (node, -1, 0, 1), like=node)
    zero = call(gm.graph, aten.zeros_like.default, (column,), like=node)
    zeros = call(gm.graph, aten.expand.default, (zero, [-1, count]), like=node)
    return call(gm.graph, aten.cat.default, ([node, zeros], -1), like=node)
