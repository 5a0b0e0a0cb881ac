"""Works on [T, ..] where the model worked on [1, T, ..].

Before:  y = aten.linear(x, w)                                                     x [1, T, H]
After:   f = aten.select(x, 0, 0); g = aten.linear(f, w); y = aten.unsqueeze(g, 0)
Leaves alone: an op without a rule here; one that works along axis 0; an operand whose first axis is not 1.
Needs:   meta["val"].  Gives: every value keeps name and shape; fold-views then cancels the select and unsqueeze pairs.
Source:  capture shows the models one batch of T tokens (docs/capture.md, the seams of a language model).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

import moec.passes.ir.ops  # noqa: F401  (registers torch.ops.moec)
from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import call, is_call, remove_dead, replace

aten = torch.ops.aten
ROWWISE = (
    aten.linear.default,
    aten.layer_norm.default,
    aten.embedding.default,
    torch.ops.moec.rms_norm.default,
    torch.ops.moec.gated_mlp.default,
)
"""Ops that treat every row of their first float or index operand alike; the others of their operands are weights."""

AXES: dict[Any, tuple[int, ...]] = {
    aten.transpose.int: (1, 2),
    aten.slice.Tensor: (1,),
    aten.select.int: (1,),
    aten.unsqueeze.default: (1,),
    aten.softmax.int: (1,),
    aten.flatten.using_ints: (1,),
    aten.cat.default: (1,),
    aten.stack.default: (1,),
    aten.split_with_sizes.default: (2,),
    aten.chunk.default: (2,),
}
"""Ops that work along axes, and the places of those axes among their arguments."""

CASTS = (aten.to.dtype, aten.type_as.default)  # elementwise too, but not tagged so
VIEWS = (aten.view.default, aten.reshape.default)


class DropBatchAxis:
    """Operations on one batch lose the batch axis."""

    name = "drop-batch-axis"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        rows = _Rows(gm)
        entries: list[Match | NoMatch] = []
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or not _is_batch(node.meta.get("val")) or _makes_or_ends(node):
                continue
            entries.append(_drop(rows, node))
        changed = any(isinstance(e, Match) for e in entries)
        if changed:
            remove_dead(gm)
        return PassResult(gm, changed, Ledger.of(entries))


class _Rows:
    """The batch-free form of values: one select per value, and the lists (split, chunk) made without a batch axis."""

    def __init__(self, gm: GraphModule) -> None:
        self.graph = gm.graph
        self.selected: dict[Node, Node] = {}
        self.lists: dict[Node, Node] = {}

    def of(self, value: Node) -> Node:
        """x [1, ..] -> x[0]. The insertion point must come before every use."""
        if value not in self.selected:
            self.selected[value] = call(self.graph, aten.select.int, (value, 0, 0), like=value)
        return self.selected[value]


def _is_batch(val: Any) -> bool:
    """Whether a value is one batch of something: [1, .., ..], or a list of such."""
    if isinstance(val, (tuple, list)):
        return bool(val) and all(_is_batch(v) for v in val)
    if not isinstance(val, Tensor) or val.dim() < 2 or not isinstance(val.shape[0], int) or val.shape[0] != 1:
        return False
    is_row = val.dim() == 2 and val.dtype.is_floating_point and isinstance(val.shape[1], int)
    return not is_row  # one token of a graph for one token


def _makes_or_ends(node: Any) -> bool:
    """Adding an axis in front, or choosing among its one: that is what this pass writes itself."""
    return is_call(node, aten.unsqueeze.default, aten.select.int) and node.args[1] == 0


def _drop(rows: _Rows, node: Node) -> Match | NoMatch:
    target, val = node.target, node.meta["val"]
    with rows.graph.inserting_before(node):
        if target is operator.getitem and node.args[0] in rows.lists:
            new = call(rows.graph, target, (rows.lists[node.args[0]], node.args[1]), like=node)
        else:
            args = _arguments(rows, node)
            if isinstance(args, str):
                return NoMatch(args, node.name, layer_of(node))
            new = call(rows.graph, target, args, dict(node.kwargs), like=node)
        if isinstance(val, (tuple, list)):
            rows.lists[node] = new
            return Match(node.name, layer_of(node))
        new._rename(f"{node.name}_rows")
        batch = call(rows.graph, aten.unsqueeze.default, (new, 0), like=node)
        name, layer = node.name, layer_of(node)
        replace(node, batch)
    return Match(name, layer)


def _arguments(rows: _Rows, node: Node) -> tuple[Any, ...] | str:
    """The arguments of the same op without the batch axis, or why there are none."""
    target = node.target
    if target in ROWWISE:
        place = 1 if target is aten.embedding.default else 0
        value = node.args[place]
        if not _is_batch(value.meta["val"]):
            return f"its operand {value.name} has no batch axis"
        return (*node.args[:place], rows.of(value), *node.args[place + 1 :])
    if target in CASTS or torch.Tag.pointwise in getattr(target, "tags", ()):
        rank = node.meta["val"].dim()
        return map_arg(node.args, lambda n: rows.of(n) if _rank(n) == rank else n)
    if target in VIEWS:
        value, shape = node.args
        return (value, list(shape[1:])) if shape[0] == 1 else "its shape does not begin with a literal 1"
    if target not in AXES:
        return f"no rule for {target}"
    places = AXES[target] if target is not aten.flatten.using_ints else (1, 2)
    axes = [node.args[p] if p < len(node.args) else 0 for p in places if p < len(node.args) or p == places[0]]
    first = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
    if not all(_is_batch(n.meta["val"]) for n in first):
        return "an operand has no batch axis"
    rank = first[0].meta["val"].dim()
    if any(a in (0, -rank) for a in axes):
        return "it works along the batch axis"
    args = list(map_arg(node.args, lambda n: rows.of(n) if n in first else n))
    for place, axis in zip(places, axes, strict=False):
        args[place] = axis - 1 if axis > 0 else axis
    return tuple(args)


def _rank(node: Node) -> int:
    val = node.meta.get("val")
    return val.dim() if isinstance(val, Tensor) else -1
