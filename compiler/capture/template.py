"""Builds the graph of a deep model from the graph of a few of its layers.

Before: the graph of layers 0, 1, 7 of eight equal ones       After: that of layers 0 to 7; 2 to 6 are copies of 1
Needs: layers of one kind give equal subgraphs, and one value goes from a layer to the next; else None, and the whole
model must be traced.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from moec.compiler.capture.kinds import LayerPlan
from moec.passes.ir.weights import Weight, add_weight, weights_of

_CACHE = re.compile(r"cache_(\d+)_([a-z])")


@dataclasses.dataclass(frozen=True)
class _Parts:
    """A graph in order: before the layers, each traced layer, after them; hidden: the value that each layer gives."""

    before: list[Node]
    layers: dict[int, list[Node]]
    after: list[Node]
    hidden: dict[int, Node]


def instantiate(gm: GraphModule, plan: LayerPlan, weights: Mapping[str, Weight]) -> GraphModule | None:
    """The graph of all layers, or None where the traced layers do not allow it.

    Args: gm: clean, of the traced layers.  weights: those of all layers, by dotted name.
    """
    parts = _split(gm, plan)
    if parts is None:
        return None
    names = {attribute: name for name, attribute in _attribute_names(gm, weights).items()}
    template: dict[int, int] = {}
    for kind in set(plan.kind_of):
        traced = [i for i in plan.traced if plan.kind_of[i] == kind]
        if len({_signature(parts, i, plan, names) for i in traced if i != plan.traced[0]}) > 1:
            return None
        template[kind] = next((i for i in traced if i != plan.traced[0]), traced[0])
    return _Builder(gm, plan, parts, names, weights).build(template)


def _attribute_names(gm: GraphModule, weights: Mapping[str, Weight]) -> dict[str, str]:
    """Dotted weight name -> the attribute that holds it."""
    attributes = {weight: attribute for attribute, weight in weights_of(gm).items()}
    return {name: attributes[w] for name, w in weights.items() if w in attributes}


def _split(gm: GraphModule, plan: LayerPlan) -> _Parts | None:
    before: list[Node] = []
    after: list[Node] = []
    layers: dict[int, list[Node]] = {i: [] for i in plan.traced}
    deep: set[Node] = set()  # everything that depends on a layer
    behind: set[Node] = set()  # what of it lies outside the layers
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        layer = node.meta.get("layer")
        if layer is not None:
            if any(a in behind for a in node.all_input_nodes):
                return None
            layers[layer].append(node)
            deep.add(node)
        elif any(a in deep for a in node.all_input_nodes):
            after.append(node)
            deep.add(node)
            behind.add(node)
        else:
            before.append(node)
    if not all(layers.values()):
        return None
    hidden: dict[int, Node] = {}
    for i in plan.traced:
        inside = set(layers[i])
        leaving = [n for n in layers[i] if any(u not in inside for u in n.users)]
        readers = {u.meta.get("layer") for n in leaving for u in n.users if u not in inside and u.op != "output"}
        following = next((j for j in plan.traced if j > i), None)
        if len(leaving) != 1 or not readers <= {following}:
            return None
        hidden[i] = leaving[0]
    return _Parts(before, layers, after, hidden)


def _signature(parts: _Parts, layer: int, plan: LayerPlan, names: Mapping[str, str]) -> str:
    """A layer's subgraph as text in which its own number does not occur."""
    number = {n: k for k, n in enumerate(parts.layers[layer])}
    previous = parts.hidden.get(plan.traced[plan.traced.index(layer) - 1])

    def text(node: Node) -> Any:
        if node in number:
            return f"%{number[node]}"
        if node is previous:
            return "%previous"
        if node.op == "get_attr":
            return _renumbered(names.get(str(node.target), str(node.target)), plan.stack, layer, "N")
        return node.name.replace(f"cache_{layer}_", "cache_N_") if node.op == "placeholder" else node.name

    lines = [f"{n.target} {torch.fx.map_arg((n.args, dict(n.kwargs)), text)}" for n in number]
    return "\n".join([*lines, f"gives %{number[parts.hidden[layer]]}"])


def _renumbered(name: str, stack: str, old: int, new: int | str) -> str:
    return name.replace(f"{stack}.{old}.", f"{stack}.{new}.", 1)


class _Builder:
    """Copies the parts into a new graph, in order."""

    def __init__(
        self, gm: GraphModule, plan: LayerPlan, parts: _Parts, names: Mapping[str, str], weights: Mapping[str, Weight]
    ) -> None:
        self.gm, self.plan, self.parts, self.names, self.weights = gm, plan, parts, names, weights
        self.graph = Graph()
        self.made: dict[str, Node] = {}  # placeholders and attributes of the new graph
        self.attributes = _attribute_names(gm, weights)

    def build(self, template: Mapping[int, int]) -> GraphModule:
        inputs = self.gm.graph.find_nodes(op="placeholder")
        env: dict[Node, Node] = {}
        for node in inputs:
            if not node.name.startswith("cache_"):
                env[node] = self._placeholder(node, node.name)
        caches = [(n, *_CACHE.fullmatch(n.name).groups()) for n in inputs if n.name.startswith("cache_")]
        sources = [
            i if i in self.plan.traced else template[self.plan.kind_of[i]] for i in range(len(self.plan.kind_of))
        ]
        for i, source in enumerate(sources):
            for node, layer, letter in caches:
                if int(layer) == source:
                    self._placeholder(node, f"cache_{i}_{letter}")
        self._copy(self.parts.before, env, None, None)
        current: Node | None = None
        for i, source in enumerate(sources):
            at = self.plan.traced.index(source)
            inner = dict(env)
            if at:
                inner[self.parts.hidden[self.plan.traced[at - 1]]] = _certain(current)
            self._copy(self.parts.layers[source], inner, source, i)
            current = inner[self.parts.hidden[source]]
        env[self.parts.hidden[self.plan.traced[-1]]] = _certain(current)
        self._copy(self.parts.after, env, None, None)
        output = self.gm.graph.output_node()
        self.graph.output(torch.fx.map_arg(output.args[0], lambda n: env[n]))
        self.gm.graph = self.graph
        self.graph.lint()
        return self.gm

    def _placeholder(self, like: Node, name: str) -> Node:
        node = self.graph.placeholder(name)
        node.meta.update(like.meta)
        self.made[name] = node
        return node

    def _copy(self, nodes: Sequence[Node], env: dict[Node, Node], source: int | None, layer: int | None) -> None:
        for node in nodes:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda a: self._input(a, env, source, layer))
            name = re.sub(r"_\d+$", "", node.name)  # the graph adds a number of its own
            copied = self.graph.create_node(node.op, node.target, args, kwargs, name)
            copied.meta.update(node.meta)
            if layer is not None:
                copied.meta["layer"] = layer
                copied.meta["nn_module_stack"] = {
                    k: (_renumbered(path + ".", self.plan.stack, source or 0, layer).removesuffix("."), kind)
                    for k, (path, kind) in (node.meta.get("nn_module_stack") or {}).items()
                }
            env[node] = copied

    def _input(self, node: Node, env: Mapping[Node, Node], source: int | None, layer: int | None) -> Node:
        if node in env:
            return env[node]
        if node.op == "placeholder":
            return self.made[node.name.replace(f"cache_{source}_", f"cache_{layer}_")]
        return self._attribute(node, source, layer)

    def _attribute(self, node: Node, source: int | None, layer: int | None) -> Node:
        """The get_attr node of the same weight in another layer."""
        name = self.names.get(str(node.target))
        attribute = str(node.target)
        if name is not None and source is not None and layer is not None:
            name = _renumbered(name, self.plan.stack, source, layer)
            if name not in self.attributes:
                self.attributes[name] = add_weight(self.gm, name, self.weights[name])
            attribute = self.attributes[name]
        if attribute not in self.made:
            made = self.graph.get_attr(attribute)
            made.meta["val"], made.meta["layer"] = node.meta["val"], layer if name is not None else node.meta["layer"]
            self.made[attribute] = made
        return self.made[attribute]


def _certain(node: Node | None) -> Node:
    assert node is not None
    return node
