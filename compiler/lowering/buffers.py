"""Buffers of a program under construction: one per tensor value of the graph, with sizes as expressions."""

from __future__ import annotations

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from moec.compiler.errors import CompileError
from moec.runtime.expressions import Size
from moec.runtime.program import Buffer


class Buffers:
    """Gives each graph value its buffer id. symbols: sympy symbol name -> the program's name ("s7" -> "T")."""

    def __init__(self, symbols: dict[str, str]) -> None:
        self.symbols = symbols
        self.all: list[Buffer] = []
        self._ids: dict[tuple[str, int], int] = {}
        self._weights: dict[str, int] = {}

    def add(self, node: fx.Node, kind: str, val: torch.Tensor, index: int = 0) -> int:
        """A buffer for result `index` of a node. val: its fake tensor."""
        self._ids[node.name, index] = self.fresh(node.name, kind, val, node)
        return self._ids[node.name, index]

    def fresh(self, name: str, kind: str, val: torch.Tensor, node: fx.Node) -> int:
        """A buffer like `val` that stands for no node's value. node: named in errors."""
        return self.add_shape(name, dtype_name(val.dtype), tuple(self.size(d, node) for d in val.shape), kind)

    def add_shape(self, name: str, dtype: str, shape: tuple[Size, ...], kind: str) -> int:
        """A further buffer -> its id. kind: as runtime/program.py says."""
        self.all.append(Buffer(name, dtype, shape, kind))
        return len(self.all) - 1

    def weight(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """The buffer of a weight of the file, made at its first use."""
        if name not in self._weights:
            self._weights[name] = self.add_shape(name, dtype_name(dtype), shape, "weight")
        return self._weights[name]

    def alias(self, node: fx.Node, source: fx.Node, index: int) -> None:
        """The node's value is result `index` of another node (getitem)."""
        self._ids[(node.name, 0)] = self._ids[(source.name, index)]

    def of(self, node: fx.Node, index: int = 0) -> int:
        """Raises: CompileError: the node has no tensor value, so nothing can read it."""
        try:
            return self._ids[(node.name, index)]
        except KeyError:
            raise CompileError(f"node {node.name} ({node.target}) gives no tensor that a program can hold") from None

    def size(self, value: int | torch.SymInt, node: fx.Node) -> Size:
        """A size as an int, or as an expression over the program's symbols.

        Raises: CompileError: it uses an operation or a symbol that programs do not have.
        """
        if isinstance(value, int):
            return value
        expression = value.node.expr
        if expression.is_Integer:
            return int(expression)
        return self._text(expression, node)

    def _text(self, e: sympy.Expr, node: fx.Node) -> str:
        if e.is_Integer:
            return str(e)
        if e.is_Symbol and str(e) in self.symbols:
            return self.symbols[str(e)]
        parts = [self._text(a, node) for a in sorted(e.args, key=str)] if e.is_Add or e.is_Mul else []
        if parts:
            return f"({(' + ' if e.is_Add else '*').join(parts)})"
        if isinstance(e, FloorDiv | Mod | PythonMod):
            a, b = (self._text(x, node) for x in e.args)
            return f"({a} {'//' if isinstance(e, FloorDiv) else '%'} {b})"
        if isinstance(e, sympy.Max | sympy.Min) or type(e).__name__ in ("Max", "Min"):
            return f"{type(e).__name__.lower()}({', '.join(self._text(x, node) for x in sorted(e.args, key=str))})"
        raise CompileError(f"node {node.name}: the size {e} is no expression of + - * // % min max over {self.symbols}")


def dtype_name(dtype: torch.dtype) -> str:
    """As programs name it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
