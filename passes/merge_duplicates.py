"""Computes equal things once: calls of one function with equal arguments become one call.

Before:  a = aten.unsqueeze(cos, 1); ..; b = aten.unsqueeze(cos, 1)
After:   a = aten.unsqueeze(cos, 1)                                   (b's readers read a)
Leaves alone: calls that write or draw random numbers, what they write to, and outputs.
Needs:   nothing.  Gives: no two equal pure calls.
Source:  common subexpression elimination over straight-line code.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from moec.passes.infra.base import Ledger, Match, PassContext, PassResult, layer_of


class MergeDuplicates:
    """Equal pure calls become one."""

    name = "merge-duplicates"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        written = {a for n in gm.graph.nodes if _writes(n) for a in n.all_input_nodes}
        first: dict[Hashable, Node] = {}
        matched: list[Match] = []
        for node in list(gm.graph.nodes):
            if not _mergeable(node, written):
                continue
            kept = first.setdefault(_key(node), node)
            if kept is node or any(u.op == "output" for u in node.users):
                continue
            node.replace_all_uses_with(kept, propagate_meta=False)
            matched.append(Match(node.name, layer_of(node), f"is {kept.name}"))
            gm.graph.erase_node(node)
        return PassResult(gm, bool(matched), Ledger(tuple(matched)))


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _mergeable(node: Node, written: set[Node]) -> bool:
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or _writes(node) or node in written or written.intersection(node.all_input_nodes):
        return False
    return torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())


def _key(node: Node) -> Hashable:
    """Equal for nodes that give the same value. Numbers compare with their types: 1 is not 1.0."""
    return node.op, node.target, _freeze(node.args), _freeze(sorted(node.kwargs.items()))


def _freeze(arg: Any) -> Hashable:
    if isinstance(arg, (tuple, list)):
        return tuple(_freeze(a) for a in arg)
    return arg if isinstance(arg, Node) else (type(arg), repr(map_arg(arg, lambda n: n.name)))
