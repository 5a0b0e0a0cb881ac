"""Where rotation angles become cosines and sines, and what happens to them on the way to a rotation.

A rope table is a chain: angles [.., T, R/2] -> (doubled to R) -> cos, sin or polar -> scaled, cast -> sliced, repeated,
unsqueezed. The half-width table [T, R/2] that moec::rope takes is the same chain without the doubling and the shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from moec.passes.infra.rewrite import call, is_call, symbolic

aten = torch.ops.aten
TRIGS = (aten.cos.default, aten.sin.default, aten.polar.default)
POINTWISE = (aten.mul.Tensor, aten.div.Tensor, aten.to.dtype)
SHAPING = (
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.repeat_interleave.self_int,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.select.int,
    aten.squeeze.dim,
    aten.view_as_real.default,
    aten.alias.default,
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One elementwise operation of a table: target(value, *args)."""

    target: Any
    args: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """Half-width cosines or sines: steps applied to angles [.., T, R/2]. complex_: both, out of aten.polar."""

    angles: Node
    function: str
    steps: tuple[Step, ...]

    def halves(self) -> tuple[Table, ...]:
        """Itself; of a polar table its cosines and its sines."""
        if self.function != "polar":
            return (self,)
        return tuple(dataclasses.replace(self, function=f) for f in ("cos", "sin"))

    def value(self, angles: Tensor) -> Tensor:
        """[T, R/2] -> [T, R/2]."""
        out = torch.cos(angles) if self.function == "cos" else torch.sin(angles)
        for step in self.steps:
            out = step.target(out, *step.args)
        return out

    def emit(self, graph: Graph, known: dict[Any, Node]) -> Node:
        """Adds the half-width table behind its angles, once per table (known: the ones added so far)."""
        value = known.get(self.angles)
        if value is None:
            value = self.angles
            while value.meta["val"].dim() > 2:
                with graph.inserting_after(value):
                    value = call(graph, aten.select.int, (value, 0, 0), like=self.angles)
            known[self.angles] = value
        key: tuple[Any, ...] = (self.angles, self.function)
        trig = aten.cos.default if self.function == "cos" else aten.sin.default
        for step in (Step(trig, ()), *self.steps):
            key = (*key, step)
            if key not in known:
                with graph.inserting_after(value):
                    known[key] = call(graph, step.target, (value, *step.args), like=self.angles)
            value = known[key]
        return value


def table_space(gm: GraphModule, constants: Collection[Node]) -> set[Node]:
    """The cos, sin and polar calls on values that move, and every call that depends on nothing else that moves."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op != "call_function" or node in constants:
            continue
        if node.target in TRIGS:
            found.add(node)
            continue
        moving = [n for n in node.all_input_nodes if n not in constants and isinstance(n.meta.get("val"), Tensor)]
        if moving and all(n in found for n in moving):
            found.add(node)
    return found


def angles_of(trig: Any) -> Node | None:
    """The half-width angles [1, .., T, R/2] under a cos, sin or polar call: behind a doubling where there is one."""
    walk = [trig.args[1] if trig.target is aten.polar.default else trig.args[0]]
    while is_call(walk[-1], *SHAPING, aten.cat.default):
        inner = _doubled(walk[-1])
        if inner is not None:
            walk = [inner]
        elif is_call(walk[-1], aten.cat.default):
            break
        else:
            walk.append(walk[-1].args[0])
    return next((n for n in walk if all(size == 1 for size in _outer(n))), None)


def _outer(node: Node) -> list[Any]:
    """The sizes in front of [T, R/2]."""
    return [symbolic(n) for n in node.meta["val"].shape[:-2]]


def _doubled(node: Any) -> Node | None:
    """x of cat([x, x]) or repeat_interleave(x, 2)."""
    if is_call(node, aten.cat.default):
        first, *others = node.args[0]
        return first if len(others) == 1 and others[0] is first else None
    return node.args[0] if is_call(node, aten.repeat_interleave.self_int) and node.args[1] == 2 else None


def table_of(leaf: Node) -> Table | str:
    """The half-width table behind a node of the table space, or why there is none."""
    steps: list[Step] = []
    node: Any = leaf
    while node.target not in TRIGS:
        numbers = tuple(node.args[1:])
        if is_call(node, *POINTWISE) and not any(isinstance(a, Node) for a in numbers):
            steps.append(Step(node.target, numbers))
        elif not is_call(node, *SHAPING):
            return f"the table {leaf.name} goes through {node.target} ({node.name})"
        node = node.args[0]
    angles = angles_of(node)
    if angles is None:
        return f"the table {leaf.name} comes from angles of a shape other than [1, T, R/2]"
    names = {aten.cos.default: "cos", aten.sin.default: "sin", aten.polar.default: "polar"}
    return Table(angles, names[node.target], tuple(reversed(steps)))


def nodes_between(angles: Node, leaves: Collection[Node]) -> list[Node]:
    """The calls that make table leaves out of angles, in order."""
    inside: dict[Node, None] = {}
    todo = list(leaves)
    while todo:
        node = todo.pop()
        if node is angles or node in inside or node.op != "call_function":
            continue
        if not isinstance(node.meta.get("val"), Tensor):
            continue
        inside[node] = None
        todo += node.all_input_nodes
    return sorted(inside, key=lambda n: n._sort_key)
