"""Joins a residual sum and the norm that reads it: one pass over memory gives both.

Before:  s = aten.add(residual, y); n = moec::rms_norm(s, w, eps, ..)
After:   n, s = moec::add_rms_norm(y, residual, w, eps, ..)
Leaves alone: a sum of unlike shapes or dtypes, or with a factor (alpha); a second norm of the same sum.
Needs:   lift-norm.  Gives: s keeps its name, n keeps its name.
Source:  the usual residual fusion; the sum is rounded before the norm reads it, as in the models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

import moec.passes.ir.ops
from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import call_many, calls, in_order, is_call, replace, symbolic

aten, moec = torch.ops.aten, torch.ops.moec


class FuseResidualNorm:
    """add + rms_norm become add_rms_norm."""

    name = "fuse-residual-norm"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        entries: list[Match | NoMatch] = []
        for norm in calls(gm, moec.rms_norm.default):
            total = norm.args[0]
            if is_call(total, aten.add.Tensor, aten.add_.Tensor):
                entries.append(_fuse(gm, total, norm))
            elif _is_fused_sum(total):
                entries.append(NoMatch("its sum is fused with another norm", norm.name, layer_of(norm)))
        changed = any(isinstance(e, Match) for e in entries)
        return PassResult(gm, changed, Ledger.of(entries))


def _is_fused_sum(node: Any) -> bool:
    maker = node.args[0] if node.args else None
    return isinstance(maker, Node) and is_call(maker, moec.add_rms_norm.default) and node.args[1] == 1


def _fuse(gm: GraphModule, total: Node, norm: Node) -> Match | NoMatch:
    reason = _why_not(total)
    if reason:
        return NoMatch(reason, norm.name, layer_of(norm))
    older, newer = _operands(total)
    weight = norm.args[1]
    if isinstance(weight, Node) and total < weight:
        total.prepend(weight)
    name, layer = norm.name, layer_of(norm)
    with gm.graph.inserting_before(total):
        normed, summed = call_many(gm.graph, moec.add_rms_norm.default, (newer, older, *norm.args[1:]), like=norm)
    for key in ("layer", "nn_module_stack"):
        if key in total.meta:
            summed.meta[key] = total.meta[key]
    replace(norm, normed)
    replace(total, summed)
    return Match(name, layer, f"with {summed.name}")


def _operands(total: Node) -> list[Node]:
    """The residual stream, then what is added to it: the older value first."""
    return in_order(total.args[:2])


def _why_not(total: Node) -> str | None:
    a, b = total.args[:2]
    if total.kwargs.get("alpha", 1) != 1:
        return f"the sum {total.name} scales an operand"
    if not isinstance(a, Node) or not isinstance(b, Node):
        return f"the sum {total.name} adds a number"
    if a.meta["val"].dtype != b.meta["val"].dtype:
        return f"the sum {total.name} mixes {a.meta['val'].dtype} and {b.meta['val'].dtype}"
    if [symbolic(n) for n in a.meta["val"].shape] != [symbolic(n) for n in b.meta["val"].shape]:
        return f"the sum {total.name} broadcasts"
    return None
