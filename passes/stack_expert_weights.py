"""Brings expert weights into the canonical layout: [E, 2F, H] gate half first, and [E, H, F].

Before:
    experts: .. = moec.experts(x, weights, chosen, w_in, w_out, b_in, .., "swigluoai@7.0@1.702", 0, False, True, True)
After:
    experts: .. = moec.experts(x, weights, chosen, w_in_rows, w_out_rows, b_in_halves, .., "swigluoai@7.0@1.702")

Only the recipes of the weights change (transpose, then even rows before odd ones); nothing is read.

Leaves alone: weights that the graph computes.
Needs: weights as get_attr nodes.  Gives: experts calls without layout flags.
Source: GPT-OSS stores [E, H, 2F] with gate and up in turn; Llama 4 stores [E, H, 2F].
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import call, calls, remove_dead, replace
from moec.passes.ir.experts_call import ExpertsCall
from moec.passes.ir.weights import Weight, concat, slice_, transpose, weight_node, weights_of


@dataclasses.dataclass(frozen=True)
class StackExpertWeights:
    """See the module."""

    name: str = "stack-expert-weights"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        entries: list[Match | NoMatch] = []
        for node in calls(gm, torch.ops.moec.experts.default):
            site = ExpertsCall.of(node)
            if not (site.transposed or site.interleaved):
                continue
            computed = [w.name for w in _operands(site) if w.op != "get_attr"]
            if computed:
                reason = f"the graph computes {', '.join(computed)}; only stored weights are laid out anew"
                entries.append(NoMatch(reason, node.name, layer_of(node)))
                continue
            entries.append(Match(node.name, layer_of(node), _detail(site)))
            rewrite(gm, node, site)
        ledger = Ledger.of(entries)
        if ledger.matched:
            remove_dead(gm)
        return PassResult(gm, bool(ledger.matched), ledger)


def _operands(site: ExpertsCall) -> list[Node]:
    return [w for w in (site.w_gate_up, site.w_down, site.b_gate_up) if w is not None]


def _detail(site: ExpertsCall) -> str:
    return " and ".join(["transposed"] * site.transposed + ["interleaved"] * site.interleaved)


def rewrite(gm: GraphModule, node: Node, site: ExpertsCall) -> None:
    """Gives one call canonical weights and clears its flags."""
    known = weights_of(gm)

    def stored(w: Node) -> Weight:
        return known[str(w.target)]

    with gm.graph.inserting_before(node):
        w_in, w_out, b_in = site.w_gate_up, site.w_down, site.b_gate_up
        w_in = weight_node(gm, f"{w_in.target}_rows", canonical(stored(w_in), site.transposed, site.interleaved))
        if site.transposed:
            w_out = weight_node(gm, f"{w_out.target}_rows", transpose(stored(w_out), 1, 2))
        if b_in is not None and site.interleaved:
            b_in = weight_node(gm, f"{b_in.target}_halves", halves(stored(b_in)))
        for w in (w_in, w_out, b_in):
            if w is not None:
                w.meta.setdefault("layer", layer_of(node))
        plain = dataclasses.replace(
            site, w_gate_up=w_in, w_down=w_out, b_gate_up=b_in, transposed=False, interleaved=False
        )
        new = call(gm.graph, torch.ops.moec.experts.default, plain.args[:-2], like=node)
    replace(node, new)


def canonical(w: Weight, transposed: bool, interleaved: bool) -> Weight:
    """A stack of input projections in any stored layout -> [E, 2F, H], gate half first."""
    w = transpose(w, 1, 2) if transposed else w
    return halves(w) if interleaved else w


def halves(w: Weight) -> Weight:
    """[E, 2F, ..] with gate and up rows in turn -> gate rows first."""
    rows = w.shape[1]
    return concat([slice_(w, 1, 0, rows, 2), slice_(w, 1, 1, rows, 2)], 1)
