"""Puts a plan's shares on the graph: every site that a plan spreads learns what this rank holds.

Before:  y = moec.cached_attention(q, k, v, ..)
After:   the same, with meta["share"] = LayerShare(query_heads=0..5 of 36, ..)          (no node changes)
Leaves alone: sites whose sizes are not the plan's; attention whose query heads do not divide evenly over the key/value
         heads that the rank holds.
Needs:   options["choose-strategy"] = RankShares (passes/placement/rank_shares.py); without it nothing is chosen.
Gives:   meta["share"] on attention, experts, dense FFNs, embedding and output projection.
Source:  design.md section 4, place.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import calls
from moec.passes.placement.rank_shares import LayerShare, RankShares

aten, moec = torch.ops.aten, torch.ops.moec


class ChooseStrategy:
    """See the module."""

    name = "choose-strategy"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        shares = context.options.get(self.name)
        if shares is None:
            return PassResult(gm, False, Ledger())
        entries: list[Match | NoMatch] = []
        for target in (moec.cached_attention.default, moec.experts.default, moec.gated_mlp.default):
            for node in calls(gm, target):
                entries.append(_choose(node, shares))
        for node in calls(gm, moec.latent_attention.default):
            reason = "its cache has no heads to cut; attention stays whole on every rank"
            entries.append(NoMatch(reason, node.name, layer_of(node)))
        for node, span in (*((n, shares.embedding) for n in calls(gm, aten.embedding.default)), *_heads(gm, shares)):
            rows = _size(node.args[0] if node.target is aten.embedding.default else node.args[1], 0)
            if rows != span.total:
                entries.append(NoMatch(f"{rows} vocabulary rows, the plan has {span.total}", node.name))
                continue
            node.meta["share"] = span
            entries.append(Match(node.name, None, f"rows {span.start} to {span.stop} of {span.total}"))
        ledger = Ledger.of(entries)
        return PassResult(gm, bool(ledger.matched), ledger)


def _heads(gm: GraphModule, shares: RankShares) -> list[tuple[Node, object]]:
    """The output projection: products outside layers with as many rows as the vocabulary."""
    linears = (n for n in calls(gm, aten.linear.default) if layer_of(n) is None)
    return [(n, shares.head) for n in linears if _size(n.args[1], 0) == shares.head.total]


def _choose(node: Node, shares: RankShares) -> Match | NoMatch:
    layer = layer_of(node)
    if layer is None or layer >= len(shares.layers):
        return NoMatch(f"layer {layer} is not one of the plan's {len(shares.layers)}", node.name, layer)
    share = shares.layers[layer]
    reason, detail = _fits(node, share)
    if reason:
        return NoMatch(reason, node.name, layer)
    node.meta["share"] = share
    return Match(node.name, layer, detail)


def _fits(node: Node, share: LayerShare) -> tuple[str, str]:
    """(why the share is not this site's, what the rank holds)."""
    if node.target is moec.cached_attention.default:
        heads, kv_heads = _size(node.args[0], 1), _size(node.args[1], 1)
        planned = (share.query_heads.total, share.kv_heads.total)
        if (heads, kv_heads) != planned:
            return f"{heads} query and {kv_heads} key/value heads, the plan has {planned[0]} and {planned[1]}", ""
        per_kv, held = heads // kv_heads, share.query_heads
        partial = held.start % per_kv or held.stop % per_kv
        if share.kv_heads.size > 1 and partial:
            return f"query heads {held.start} to {held.stop} share key/value heads of {per_kv} unevenly", ""
        return "", f"query heads {held.start} to {held.stop} of {held.total}"
    if node.target is moec.experts.default:
        experts, columns = _size(node.args[3], 0), share.expert_columns
        if columns is None or experts != share.num_experts or _size(node.args[4], 2) != columns.total:
            wanted = f"{share.num_experts} of {columns.total if columns else 0}"
            return f"{experts} experts of width {_size(node.args[4], 2)}, the plan has {wanted}", ""
        return (
            "",
            f"{len(share.experts)} of {experts} experts, columns {columns.start} to {columns.stop} of {columns.total}",
        )
    width = _size(node.args[2], 1)
    if share.dense is None or width != share.dense.total:
        return f"a dense FFN of width {width}, the plan has {share.dense.total if share.dense else 'none'}", ""
    return "", f"columns {share.dense.start} to {share.dense.stop} of {share.dense.total}"


def _size(node: object, dim: int) -> int:
    return int(node.meta["val"].shape[dim]) if isinstance(node, Node) else -1
