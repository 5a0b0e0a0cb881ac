"""Puts a plan's shares on the graph: every site that a plan spreads learns what this rank holds.

Before:  y = moec.cached_attention(q, k, v, ..)
After:   the same, with meta["share"] = LayerShare(query_heads=0..5 of 36, ..)          (no node changes)
Leaves alone: sites whose sizes are not the plan's. Sites of layers of other pipeline stages are none of this rank's.
Needs:   options["choose-strategy"] = RankShares (passes/placement/rank_shares.py); without it nothing is chosen.
Gives:   meta["share"] on attention, experts, dense FFNs, embedding and output projection.
Source:  design.md section 4, place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import calls
from moec.passes.placement.rank_shares import LayerShare, RankShares, Span

aten, moec = torch.ops.aten, torch.ops.moec


class ChooseStrategy:
    """See the module."""

    name = "choose-strategy"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        shares = context.options.get(self.name)
        if shares is None:
            return PassResult(gm, False, Ledger())
        entries = [_choose(node, shares) for target in LAYER_SITES for node in _own(gm, target, shares)]
        ends = ((calls(gm, aten.embedding.default), 0, shares.embedding), (_heads(gm), 1, shares.head))
        for nodes, table, span in ends:
            entries += [_choose_rows(node, table, span) for node in nodes if span is not None]
        ledger = Ledger.of(entries)
        return PassResult(gm, bool(ledger.matched), ledger)


def _own(gm: GraphModule, target: object, shares: RankShares) -> list[Node]:
    """The calls in layers of this rank's stage, and in layers that the plan does not know."""
    known, cuts, stage = len(shares.layers), shares.place.cuts, shares.place.stage
    own = set(range(cuts[stage], cuts[stage + 1]))
    return [n for n in calls(gm, target) if (i := layer_of(n)) is None or i in own or i >= known]


def _heads(gm: GraphModule) -> list[Node]:
    """Products outside layers behind which nothing but elementwise work is left: the output projection is the last."""
    linears = [n for n in calls(gm, aten.linear.default) if layer_of(n) is None]
    return linears[-1:]


def _choose_rows(node: Node, table: int, span: Span) -> Match | NoMatch:
    rows = _size(node.args[table], 0)
    if rows != span.total:
        return NoMatch(f"{rows} vocabulary rows, the plan has {span.total}", node.name)
    node.meta["share"] = span
    return Match(node.name, None, f"rows {span.start} to {span.stop} of {span.total}")


def _choose(node: Node, shares: RankShares) -> Match | NoMatch:
    layer = layer_of(node)
    share = None if layer is None or layer >= len(shares.layers) else shares.layers[layer]
    if share is None:
        return NoMatch(f"layer {layer} is not one of the plan's {len(shares.layers)}", node.name, layer)
    reason, detail = _FITS[node.target](node, share)
    if reason:
        return NoMatch(reason, node.name, layer)
    node.meta["share"] = share
    return Match(node.name, layer, detail)


def _attention_fits(node: Node, share: LayerShare) -> tuple[str, str]:
    """(why the share is not this site's, what the rank holds)."""
    held, heads = share.query_heads, _size(node.args[0], 1)
    latent = node.target is moec.latent_attention.default
    kv_heads = share.num_kv_heads if latent else _size(node.args[1], 1)
    if (heads, kv_heads) != (held.total, share.num_kv_heads):
        planned = f"the plan has {held.total} and {share.num_kv_heads}"
        return f"{heads} query and {kv_heads} key/value heads, {planned}", ""
    return "", f"query heads {held.start} to {held.stop} of {held.total}"


def _experts_fit(node: Node, share: LayerShare) -> tuple[str, str]:
    experts, columns = _size(node.args[3], 0), share.expert_columns
    planned = len(share.residency.copies) if share.residency else 0
    if columns is None or experts != planned or _size(node.args[4], 2) != columns.total:
        wanted = f"{planned} of {columns.total if columns else 0}"
        return f"{experts} experts of width {_size(node.args[4], 2)}, the plan has {wanted}", ""
    return "", f"{experts} experts, columns {columns.start} to {columns.stop} of {columns.total}"


def _mlp_fits(node: Node, share: LayerShare) -> tuple[str, str]:
    width = _size(node.args[2], 1)
    if share.dense is None or width != share.dense.total:
        return f"a dense FFN of width {width}, the plan has {share.dense.total if share.dense else 'none'}", ""
    return "", f"columns {share.dense.start} to {share.dense.stop} of {share.dense.total}"


_FITS: dict[object, Callable[[Node, LayerShare], tuple[str, str]]] = {
    moec.cached_attention.default: _attention_fits,
    moec.latent_attention.default: _attention_fits,
    moec.experts.default: _experts_fit,
    moec.gated_mlp.default: _mlp_fits,
}
LAYER_SITES = tuple(_FITS)


def _size(node: object, dim: int) -> int:
    return int(node.meta["val"].shape[dim]) if isinstance(node, Node) else -1
