"""Cuts the weights of every chosen site to what this rank holds; what the site then gives is a partial sum.

Before:  q = aten.linear(x, wq); .. a = moec.cached_attention(q, k, v, ..); y = aten.linear(a, wo)
         e = moec.experts(x, weights, chosen, w_gate_up, w_down, ..)
After:   the same over rows of wq, wk, wv and columns of wo; experts over resident experts and their columns, with
         `chosen` mapped to local numbers (an expert that is not held maps beyond the last, which adds nothing); an
         output bias stays on one rank
Leaves alone: attention that is normalised over all heads at once (OLMoE, MiniMax-M2); attention whose queries, keys or
         values are not a product followed by what works on every head alone; experts with shared experts stacked behind
         them.
Needs:   choose-strategy, and cut-stages where there are stages.
Gives:   meta["partial"] on values that the ranks of a lane must add up; meta["gathered"] on the part of the logits that
         they must join; meta["exchanged"] on experts whose tokens must travel; caches of the rank's key/value heads.
Source:  tensor parallelism of Megatron-LM (arXiv 1909.08053), with any integer shares.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import calls, fake_value, remove_dead
from moec.passes.placement.rank_shares import LayerShare, RankShares
from moec.passes.placing.shard_attention import shard_attention
from moec.passes.placing.shard_experts import shard_experts, shard_mlp
from moec.passes.placing.shard_vocabulary import shard_embedding, shard_head

aten, moec = torch.ops.aten, torch.ops.moec
SITES = (
    moec.cached_attention.default,
    moec.latent_attention.default,
    moec.experts.default,
    moec.gated_mlp.default,
    aten.embedding.default,
    aten.linear.default,
)


class ShardWeights:
    """See the module."""

    name = "shard-weights"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        shares: RankShares | None = context.options.get("choose-strategy")
        entries: list[Match | NoMatch] = []
        for target in SITES if shares else ():
            for node in [n for n in calls(gm, target) if "share" in n.meta]:
                reason = _shard(gm, node, node.meta.pop("share"), shares)
                where = (node.name, layer_of(node))
                entries.append(NoMatch(reason, *where) if reason else Match(*where))
        ledger = Ledger.of(entries)
        if ledger.matched:
            remove_dead(gm)
            _recompute(gm)
        return PassResult(gm, bool(ledger.matched), ledger)


def _shard(gm: GraphModule, node: Node, share: LayerShare, shares: RankShares) -> str:
    """Cuts one site; returns why it cannot be cut. A lane of one rank holds all of what lanes share."""
    place = shares.place
    alone = len(place.lane_ranks) == 1
    if node.target is moec.experts.default:
        if share.residency is None or share.expert_columns is None:
            return "the plan has no experts here"
        return shard_experts(gm, node, share.residency, share.expert_columns, place)
    if alone:
        return ""
    if node.target is aten.embedding.default and shares.embedding is not None:
        return shard_embedding(gm, node, shares.embedding)
    if node.target is aten.linear.default:
        return shard_head(gm, node, shares)
    if node.target is moec.gated_mlp.default and share.dense is not None:
        return shard_mlp(gm, node, share.dense)
    return shard_attention(gm, node, share)


def _recompute(gm: GraphModule) -> None:
    """Fake values of every call whose operands, or arguments, may have changed size."""
    for node in gm.graph.nodes:
        reads_tensor = any(isinstance(p.meta.get("val"), Tensor | tuple | list) for p in node.all_input_nodes)
        if node.op == "call_function" and reads_tensor and not isinstance(node.meta["val"], torch.SymInt):
            node.meta["val"] = fake_value(node.target, node.args, dict(node.kwargs))
