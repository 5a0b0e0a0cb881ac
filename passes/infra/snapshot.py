"""A graph as it was: what a pass may change is kept aside, and compared by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from moec.passes.ir.evaluate import attribute
from moec.passes.ir.weights import Weight, weights_of


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A graph as it was: its nodes by name in order, its weights, and its plain attributes."""

    graph: Graph
    nodes: dict[str, Node]
    weights: dict[str, Weight]
    plain: dict[str, Tensor]


def take(gm: GraphModule) -> Snapshot:
    """A copy of the graph and of its tables; no tensor is copied. Cost: about 15 us per node."""
    graph = Graph()
    copied: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        new = graph.node_copy(node, copied.__getitem__)
        new.name = node.name
        copied[node] = new
    weights = weights_of(gm)
    named = {str(n.target) for n in graph.find_nodes(op="get_attr")}
    plain = {name: attribute(gm, name) for name in named - weights.keys()}
    return Snapshot(graph, {n.name: n for n in graph.nodes}, dict(weights), plain)


def named(args: Any) -> Any:
    """Arguments with names for nodes."""
    return map_aggregate(args, lambda a: f"%{a.name}" if isinstance(a, Node) else a)


def changed_names(before: Snapshot, after: Snapshot) -> set[str]:
    """Names of values that only one graph has, or that the two make differently."""
    names = set(before.nodes.keys() ^ after.nodes.keys())
    for name in before.nodes.keys() & after.nodes.keys():
        if not _same(before, after, name):
            names.add(name)
    return names


def _same(before: Snapshot, after: Snapshot, name: str) -> bool:
    a, b = before.nodes[name], after.nodes[name]
    if a.op != b.op or a.target != b.target:
        return False
    if a.op == "get_attr":
        x, y = before.weights.get(str(a.target)), after.weights.get(str(b.target))
        return x is y or x == y
    return named(a.args) == named(b.args) and named(a.kwargs) == named(b.kwargs)
