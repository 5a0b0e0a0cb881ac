"""Copies of graphs, for those who rewrite one and keep the other."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule


def copy_of(gm: GraphModule) -> GraphModule:
    """An independent copy of a graph with its metadata; weights are lazy and shared, those that nothing reads stay
    behind."""
    graph, known = Graph(), dict[Any, Any]()
    for node in gm.graph.nodes:
        known[node] = graph.node_copy(node, known.__getitem__)
        known[node].meta = dict(node.meta)
    new = GraphModule(gm, graph)
    new.meta.update(gm.meta)
    for name in ("weights", "groups", "symbols"):
        if name in gm.meta:
            new.meta[name] = dict(gm.meta[name])
    if "weights" in new.meta:
        new.meta["weights"] = {name: weight for name, weight in new.meta["weights"].items() if hasattr(new, name)}
    return new
