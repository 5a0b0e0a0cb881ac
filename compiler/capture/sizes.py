"""Symbolic sizes as graph nodes: every size is read from a graph input, once, at the top of the graph."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._sympy.functions import FloorDiv

sym_size = torch.ops.aten.sym_size.int


def expression(size: Any) -> Any:
    """A size as an int or a sympy expression, without adding a guard."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expr = size.node.expr
    return int(expr) if expr.is_number else expr


class Sizes:
    """Finds or makes the node of a size. New nodes follow the placeholders and have meta["val"]."""

    def __init__(self, gm: GraphModule) -> None:
        self._graph = gm.graph
        self._known: dict[Any, Node] = {}
        self._origin: dict[Any, tuple[Node, int, torch.SymInt]] = {}
        self._last = None
        for node in self._graph.find_nodes(op="placeholder"):
            self._last = node
            value = node.meta.get("val")
            for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                expr = expression(size)
                if isinstance(expr, sympy.Symbol):
                    self._origin.setdefault(expr, (node, dim, size))

    def node(self, size: Any) -> int | Node | None:
        """The value of a size in the graph: an int, a node, or None where the expression has another operation."""
        return self._node(expression(size))

    def _node(self, expr: Any) -> int | Node | None:
        if isinstance(expr, int):
            return expr
        if isinstance(expr, sympy.Integer):
            return int(expr)
        if expr not in self._known:
            made = self._make(expr)
            if made is None:
                return None
            self._known[expr] = made
        return self._known[expr]

    def _make(self, expr: Any) -> Node | None:
        if isinstance(expr, sympy.Symbol):
            if expr not in self._origin:
                return None
            node, dim, size = self._origin[expr]
            return self._insert(sym_size, (node, dim), size)
        function = {sympy.Add: operator.add, sympy.Mul: operator.mul, FloorDiv: operator.floordiv}.get(type(expr))
        if function is None:
            return None
        parts = [self._node(a) for a in expr.args]
        if any(p is None for p in parts):
            return None
        total: Any = parts[0]
        for part in parts[1:]:
            values = [p.meta["val"] if isinstance(p, Node) else p for p in (total, part)]
            value = function(*values)
            total = self._insert(function, (total, part), value) if isinstance(value, torch.SymInt) else value
        return total

    def _insert(self, target: Any, args: tuple[Any, ...], value: torch.SymInt) -> Node:
        with self._graph.inserting_after(self._last):
            node = self._graph.call_function(target, args)
        node.meta["val"], node.meta["layer"] = value, None
        self._last = node
        return node
