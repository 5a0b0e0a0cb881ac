"""Runs a graph node by node, to see what each value is: a tensor of which shape, or which number on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moec.compiler.capture.onnx import host
from moec.compiler.capture.onnx.graph import Graph, Node
from moec.compiler.capture.onnx.table import SEVERAL, attributes_of, function_of
from moec.compiler.errors import UnsupportedModel


@dataclasses.dataclass(frozen=True)
class Seen:
    """A value of one run. shape, dtype: of a tensor, else None.  number: what is on the host, else None."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    number: Any = None

    @property
    def on_host(self) -> bool:
        """Whether it is no tensor."""
        return self.shape is None


@dataclasses.dataclass(frozen=True)
class Run:
    """values: by name.  branches: by the name of an If node, the graph that was taken."""

    values: dict[str, Seen]
    branches: dict[str, str]


def check_operators(graph: Graph) -> None:
    """Raises: UnsupportedModel: names every operator, or the first attribute, that is not read."""
    unknown: dict[str, Node] = {}
    for node in _all_nodes(graph):
        if node.op != "If" and function_of(node.op) is None:
            unknown.setdefault(node.op, node)
    if unknown:
        named = ", ".join(f"{op} (node {node.name})" for op, node in sorted(unknown.items())[:8])
        raise UnsupportedModel(f"{graph.name}: operators that are not read: {named}")
    for node in _all_nodes(graph):
        strange = [] if node.op == "If" else [a for a in node.attributes if a not in attributes_of(node.op)]
        if strange:
            raise UnsupportedModel(f"{graph.name}: {node}: attribute {strange[0]} is not read")


def _all_nodes(graph: Graph) -> list[Node]:
    inner = [n for node in graph.nodes for a in node.attributes.values() if isinstance(a, Graph) for n in _all_nodes(a)]
    return [*graph.nodes, *inner]


@torch.no_grad()
def observe(graph: Graph, given: Mapping[str, Tensor]) -> Run:
    """Runs the graph on the given inputs. Raises: UnsupportedModel: names the node that does not run, and why."""
    run = Run({}, {})
    values: dict[str, Any] = {"": None, **given}
    for name, tensor in given.items():
        run.values[name] = _seen(tensor)
    _execute(graph, values, run, graph.name)
    return run


def _execute(graph: Graph, values: dict[str, Any], run: Run, file: str) -> None:
    values.update({n: host.constant(t) for n, t in graph.constants.items()})
    uses: dict[str, int] = {}
    for node in graph.nodes:
        for name in node.reads:
            uses[name] = uses.get(name, 0) + 1
    kept = {*graph.outputs, *graph.outside}
    for node in graph.nodes:
        for name, value in zip(node.outputs, _results(node, values, run, file), strict=False):
            if name:
                values[name] = value
                run.values[name] = _seen(value)
        for name in node.reads:
            uses[name] -= 1
            if not uses[name] and name not in kept and name not in graph.outside:
                values.pop(name, None)


def _results(node: Node, values: dict[str, Any], run: Run, file: str) -> tuple[Any, ...]:
    if node.op == "If":
        return _branch(node, values, run, file)
    function = function_of(node.op)
    assert function is not None  # check_operators has been there
    try:
        result = function(*(values[i] for i in node.inputs), **node.attributes)
    except UnsupportedModel as error:
        raise type(error)(f"{file}: {node}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        line = next((part.strip() for part in str(error).splitlines() if part.strip()), type(error).__name__)
        raise UnsupportedModel(f"{file}: {node} does not run: {line[:200]}") from error
    return result if node.op in SEVERAL else (result,)


def _branch(node: Node, values: dict[str, Any], run: Run, file: str) -> tuple[Any, ...]:
    condition = values[node.inputs[0]]
    if isinstance(condition, Tensor):
        raise UnsupportedModel(f"{file}: {node}: which branch is taken depends on values, not on sizes")
    taken = "then_branch" if host.number(condition) else "else_branch"
    run.branches[node.name] = taken
    inner = node.attributes[taken]
    _execute(inner, values, run, file)
    return tuple(values[o] for o in inner.outputs)


def _seen(value: Any) -> Seen:
    if isinstance(value, Tensor):
        return Seen(tuple(value.shape), value.dtype)
    return Seen(None, None, value)


def inline_branches(graph: Graph, runs: list[Run]) -> Graph:
    """The graph with the branch that every run took in the place of each If.

    Raises: UnsupportedModel: the runs took different ones: it depends on the sizes.
    """
    nodes: list[Node] = []
    constants = dict(graph.constants)
    for node in graph.nodes:
        if node.op != "If":
            nodes.append(node)
            continue
        taken = {r.branches[node.name] for r in runs}
        if len(taken) > 1:
            raise UnsupportedModel(f"{graph.name}: {node}: which branch is taken depends on the sizes of the inputs")
        inner = inline_branches(node.attributes[taken.pop()], runs)
        renamed = dict(zip(inner.outputs, node.outputs, strict=True))
        constants |= inner.constants
        nodes += inner.nodes
        for old, new in renamed.items():
            nodes.append(Node("Identity", node.name, (old,), (new,), {}, node.layer))
    return dataclasses.replace(graph, nodes=tuple(nodes), constants=constants)
