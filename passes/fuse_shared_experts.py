"""Appends shared experts to the routed ones as segments of the same stacks that every token uses.

Before:  y = add(moec::experts(x, .., w_in [E,2F,H], w_out [E,H,F]), g * moec::gated_mlp(x, s_in [2sF,H], s_out [H,sF]))
After:   y = moec::experts(x, .., w_in [E+s,2F,H], w_out [E+s,H,F], shared_weight=g, num_shared=s)
Leaves alone: a shared width that is no multiple of F, another activation, other dtypes, biases, another input, stacks
         that are not canonical. Such a shared expert stays moec::gated_mlp.
Needs:   fuse-gate-up, fold-views, stack-expert-weights.  Gives: one grouped product for both; weights stay lazy.
Source:  DeepSeekMoE, section 3.2 (a shared expert of width s*F is s experts that everybody uses); Qwen2 (sigmoid gate).
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import call, calls, is_call, remove_dead, replace
from moec.passes.ir.experts_call import ExpertsCall
from moec.passes.ir.weights import Weight, concat, reshape, slice_, weight_node, weights_of

aten, moec = torch.ops.aten, torch.ops.moec


@dataclasses.dataclass(frozen=True)
class Site:
    """total = routed + shared, or routed + factor * shared (factor [T, 1])."""

    total: Node
    routed: Node
    shared: Node
    factor: Node | None


class FuseSharedExperts:
    """Shared experts become segments of the expert stacks."""

    name = "fuse-shared-experts"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        entries: list[Match | NoMatch] = []
        for total in calls(gm, aten.add.Tensor):
            site = _site(total)
            if site is None:
                continue
            reason = _why_not(gm, site)
            entries.append(NoMatch(reason, site.shared.name, layer_of(total)) if reason else _fuse(gm, site))
        changed = any(isinstance(e, Match) for e in entries)
        if changed:
            remove_dead(gm)
        return PassResult(gm, changed, Ledger.of(entries))


def _site(total: Node) -> Site | None:
    if total.kwargs.get("alpha", 1) != 1:
        return None
    for routed, other in (total.args[:2], total.args[1::-1]):
        if not is_call(routed, moec.experts.default):
            continue
        if is_call(other, moec.gated_mlp.default):
            return Site(total, routed, other, None)
        if is_call(other, aten.mul.Tensor):
            for shared, factor in (other.args, other.args[::-1]):
                if is_call(shared, moec.gated_mlp.default) and isinstance(factor, Node):
                    return Site(total, routed, shared, factor)
    return None


def _why_not(gm: GraphModule, site: Site) -> str | None:
    routed, shared, weights = ExpertsCall.of(site.routed), site.shared, weights_of(gm)
    x, s_in, s_out, *biases, act = shared.args
    if routed.num_shared:
        return "the experts have shared segments already"
    if routed.transposed or routed.interleaved:
        return "the expert stacks are not canonical; stack-expert-weights refused them"
    if x is not routed.x:
        return f"it reads {x}, the routed experts read {routed.x}"
    stacks = [weights.get(str(getattr(n, "target", ""))) for n in (routed.w_gate_up, routed.w_down, s_in, s_out)]
    if any(w is None for w in stacks):
        return "a weight is computed in the graph"
    if any(b is not None for b in (routed.b_gate_up, routed.b_down, *biases)):
        return "the routed or the shared projections have biases"
    if routed.act != act:
        return f"its activation is {act}, the routed experts have {routed.act}"
    if len({w.dtype for w in stacks if w is not None}) != 1:
        return "its weights and the routed experts' differ in dtype"
    width, shared_width = routed.w_down.meta["val"].shape[2], s_out.meta["val"].shape[1]
    if shared_width % width:
        return f"its width {shared_width} is no multiple of the expert width {width}"
    if site.factor is not None and routed.weight_on_input:
        return "the routed weights multiply inputs, its own factor multiplies its output"
    if site.factor is not None and tuple(site.factor.meta["val"].shape[1:]) != (1,):
        return f"its factor {site.factor.name} is not [T, 1]"
    return None


def _fuse(gm: GraphModule, site: Site) -> Match:
    routed, weights = ExpertsCall.of(site.routed), weights_of(gm)
    w_in, w_out = (weights[str(n.target)] for n in (routed.w_gate_up, routed.w_down))
    s_in, s_out = (weights[str(n.target)] for n in site.shared.args[1:3])
    num_shared = s_out.shape[1] // w_out.shape[2]
    name, layer = site.total.name, layer_of(site.total)
    with gm.graph.inserting_before(site.total):
        stacks = (
            weight_node(gm, f"{routed.w_gate_up.target}_and_shared", _extended(w_in, _segments_in(s_in, num_shared))),
            weight_node(gm, f"{routed.w_down.target}_and_shared", _extended(w_out, _segments_out(s_out, num_shared))),
        )
        weight = None
        if site.factor is not None:
            weight = call(gm.graph, aten.select.int, (site.factor, 1, 0), like=site.factor)
        joined = dataclasses.replace(
            routed, w_gate_up=stacks[0], w_down=stacks[1], shared_weight=weight, num_shared=num_shared
        )
        replace(site.total, call(gm.graph, moec.experts.default, joined.args, like=site.total))
    return Match(name, layer, f"{num_shared} shared" + (", weighted" if weight else ""))


def _extended(stack: Weight, segments: list[Weight]) -> Weight:
    """[E, a, b] and s times [a, b] -> [E+s, a, b]."""
    return concat([stack, *(reshape(s, (1, *s.shape)) for s in segments)], 0)


def _segments_in(w: Weight, num_shared: int) -> list[Weight]:
    """[2sF, H], gate half first -> s times [2F, H], gate half first."""
    half = w.shape[0] // 2
    width = half // num_shared
    starts = range(0, half, width)
    return [concat([slice_(w, 0, a, a + width), slice_(w, 0, half + a, half + a + width)], 0) for a in starts]


def _segments_out(w: Weight, num_shared: int) -> list[Weight]:
    """[H, sF] -> s times [H, F]."""
    width = w.shape[1] // num_shared
    return [slice_(w, 1, a, a + width) for a in range(0, w.shape[1], width)]
