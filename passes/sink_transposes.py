"""Moves transposes behind operations that do not care, so that they meet the transposes that undo them.

Before:  a = transpose(x, 0, 1); b = moec::rms_norm(a, w, ..); c = transpose(b, 0, 1)
After:   b' = moec::rms_norm(x, w, ..); b = transpose(b', 0, 1); c = transpose(b, 0, 1)      (fold-views drops b and c)
Leaves alone: operations along a transposed axis that have no rule here; operands that are transposed differently.
Needs:   fold-views before it (a transpose stands right before its reader) and after it.  Gives: fewer of both.
Source:  models keep heads in front of tokens for their own attention; moec's ops keep tokens first.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

import moec.passes.ir.ops  # noqa: F401  (registers torch.ops.moec)
from moec.passes.infra.base import Ledger, Match, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import argument, call, is_call, remove_dead, replace

aten = torch.ops.aten
CASTS = (aten.to.dtype,)
LISTS = (aten.split_with_sizes.default, aten.chunk.default)
ALONG: dict[Any, int] = {aten.split_with_sizes.default: 2, aten.chunk.default: 2, aten.cat.default: 1}
"""Ops along one axis, and the place of that axis among their arguments (0 by default)."""


class SinkTransposes:
    """Transposes move towards the outputs."""

    name = "sink-transposes"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        matched: list[Match] = []
        for node in list(gm.graph.nodes):
            axes = _common_axes(node)
            if axes is not None:
                matched.append(Match(node.name, layer_of(node), f"axes {axes[0]} and {axes[1]}"))
                _sink(gm, node, axes)
        if matched:
            remove_dead(gm)
        return PassResult(gm, bool(matched), Ledger(tuple(matched)))


def _transposed(node: Any) -> tuple[int, int] | None:
    """The two axes that a transpose swaps, the smaller first; None: it is none."""
    if not is_call(node, aten.transpose.int):
        return None
    rank = node.meta["val"].dim()
    a, b = sorted(d % rank for d in node.args[1:3])
    return a, b


def _common_axes(node: Node) -> tuple[int, int] | None:
    """The axes that every operand of a sinkable call swaps; None: it stays."""
    operands = _operands(node)
    axes = {_transposed(n) for n in operands}
    if len(axes) != 1 or None in axes:
        return None
    (swapped,) = axes
    last = operands[0].meta["val"].dim() - 1
    fixed = [n for n in node.all_input_nodes if n not in operands]
    if (is_call(node, torch.ops.moec.rms_norm.default) or fixed) and last in swapped:
        return None
    return swapped


def _operands(node: Any) -> Sequence[Node]:
    """The operands of full rank of a call that this pass has a rule for; what is left has the last axis at most."""
    if not is_call(node):
        return ()
    if is_call(node, torch.ops.moec.rms_norm.default, *LISTS):
        return node.args[:1]
    if is_call(node, aten.cat.default):
        return node.args[0]
    if is_call(node, *CASTS) or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rank = node.meta["val"].dim()
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if all(n.meta["val"].dim() in (0, 1, rank) for n in tensors):
            return [n for n in tensors if n.meta["val"].dim() == rank]
    return ()


def _sink(gm: GraphModule, node: Node, axes: tuple[int, int]) -> None:
    operands = set(_operands(node))
    args = list(map_arg(node.args, lambda n: n.args[0] if n in operands else n))
    place = ALONG.get(node.target)
    if place is not None:
        axis = argument(node, place, "dim", 0) % next(iter(operands)).meta["val"].dim()
        args[place:] = [{axes[0]: axes[1], axes[1]: axes[0]}.get(axis, axis)]
    kwargs = {k: v for k, v in node.kwargs.items() if k != "dim"} if place is not None else dict(node.kwargs)
    with gm.graph.inserting_before(node):
        new = call(gm.graph, node.target, tuple(args), kwargs, like=node)
    for old, value in _results(gm, node, new):
        with gm.graph.inserting_before(old):
            replace(old, call(gm.graph, aten.transpose.int, (value, *axes), like=old))


def _results(gm: GraphModule, node: Node, new: Node) -> list[tuple[Node, Node]]:
    """The values that readers see, each with its counterpart: the call itself, or the parts of a list."""
    if not is_call(node, *LISTS):
        return [(node, new)]
    pairs = []
    for part in list(node.users):
        with gm.graph.inserting_before(part):
            pairs.append((part, call(gm.graph, operator.getitem, (new, part.args[1]), like=part)))
    return pairs
