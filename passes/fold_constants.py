"""Computes at compile time what does not depend on the inputs, and drops operations that do nothing.

Before:  f = mul(reciprocal(pow(1e6, div(arange(0, 8, 2), 8))), 1.0); w = to(gate_weight, f32); s = mul(cos, 1.0)
After:   f = get_attr (a weight of 4 numbers); w = get_attr (cast(gate_weight)); s is cos
Leaves alone: constants of more than 4096 numbers that are no cast of a weight; ones that need a checkpoint which is not
         there; sums with 0 (they turn -0 into 0).
Needs:   meta["weights"], meta["val"].  Gives: constants as lazy weights.
Source:  constant folding; x + (y - x) is y for integers (how Llama-4 finds its positions).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import in_order, is_call, remove_dead, replace, symbolic
from moec.passes.infra.verify import constant_nodes
from moec.passes.ir.evaluate import constants, run_nodes
from moec.passes.ir.weights import Weight, cast, literal, weight_node, weight_of, weights_of

aten = torch.ops.aten
CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default)
MOST_NUMBERS = 4096


class FoldConstants:
    """Constant subgraphs become weights; operations without effect go."""

    name = "fold-constants"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        entries: list[Match | NoMatch] = []
        for node in list(gm.graph.nodes):
            same = _same_as(node)
            if same is not None and not any(u.op == "output" for u in node.users):
                node.replace_all_uses_with(same, propagate_meta=False)
                entries.append(Match(node.name, layer_of(node), f"is {same.name}"))
        known = constant_nodes(gm)
        for node in in_order(known):
            if node.op == "call_function" and any(u not in known for u in node.users) and _is_tensor(node):
                entries.append(_fold(gm, node, known, context))
        changed = any(isinstance(e, Match) for e in entries)
        if changed:
            remove_dead(gm)
        return PassResult(gm, changed, Ledger.of(entries))


def _is_tensor(node: Node) -> bool:
    """One tensor whose size does not depend on the inputs."""
    val = node.meta.get("val")
    return isinstance(val, Tensor) and all(isinstance(n, int) for n in val.shape)


def _same_as(node: Any) -> Node | None:
    """The operand that a call gives back unchanged; None: it does something."""
    if is_call(node, aten.add.Tensor) and not node.kwargs:
        kept = _cancelled(*node.args)
    elif is_call(node, aten.to.dtype, aten.alias.default) or _is_times_one(node):
        kept = node.args[0]
    else:
        return None
    if not isinstance(kept, Node) or not isinstance(kept.meta.get("val"), Tensor):
        return None
    old, new = node.meta["val"], kept.meta["val"]
    shapes = [symbolic(n) for n in old.shape] == [symbolic(n) for n in new.shape]
    return kept if old.dtype == new.dtype and shapes else None


def _is_times_one(node: Node) -> bool:
    return is_call(node, aten.mul.Tensor, aten.div.Tensor) and node.args[1] in (1, 1.0) and not node.kwargs


def _cancelled(a: Any, b: Any, *more: Any) -> Node | None:
    """y of x + (y - x) in integers."""
    for x, difference in ((a, b), (b, a)):
        if is_call(difference, aten.sub.Tensor) and difference.args[1] is x and not difference.kwargs:
            y = difference.args[0]
            if isinstance(y, Node) and not y.meta["val"].dtype.is_floating_point:
                return y
    return None


def _fold(gm: GraphModule, node: Node, known: Collection[Node], context: PassContext) -> Match | NoMatch:
    weight = _recipe(gm, node) or _computed(gm, node, known, context)
    if isinstance(weight, str):
        return NoMatch(weight, node.name, layer_of(node))
    name, layer = node.name, layer_of(node)
    with gm.graph.inserting_before(node):
        new = weight_node(gm, name, weight)
        new.meta["layer"] = layer
        replace(node, new)
    return Match(name, layer, str(weight))


def _recipe(gm: GraphModule, node: Node) -> Weight | None:
    """The lazy cast that a cast of a weight is."""
    operand = node.args[0] if is_call(node, *CASTS) else None
    weight = weight_of(gm, operand)
    return None if weight is None else cast(weight, node.meta["val"].dtype)


def _computed(gm: GraphModule, node: Node, known: Collection[Node], context: PassContext) -> Weight | str:
    """The numbers themselves, or why they cannot be had."""
    count = torch.Size(node.meta["val"].shape).numel()
    if count > MOST_NUMBERS:
        return f"a constant of {count} numbers; at most {MOST_NUMBERS} are folded"
    inside: dict[Node, None] = {}
    todo = [node]
    while todo:
        one = todo.pop()
        if one not in inside:
            inside[one] = None
            todo += one.all_input_nodes
    weights = weights_of(gm)
    reads = [n for n in inside if n.op == "get_attr" and any(True for _ in weights[str(n.target)].sources())]
    if reads and context.read is None:
        return f"it depends on {reads[0].name}, and there is no checkpoint to read it from"
    return literal(run_nodes(in_order(inside), {}, constants(gm, context.read), (node.name,))[node.name])
