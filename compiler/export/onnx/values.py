"""What the nodes of an FX graph are in the ONNX graph, and their dtypes and ranks."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from moec.compiler.export.onnx.builder import Builder
from moec.compiler.export.onnx.errors import ExportError


class Values:
    """FX node -> ONNX value(s). A symbolic size is an i64[1]."""

    def __init__(self, b: Builder) -> None:
        self.b = b
        self.of: dict[Node, Any] = {}
        self.matrices: dict[Node, ir.Value] = {}  # weights that are stored transposed

    def tensor(self, arg: Any, dtype: torch.dtype | None = None) -> ir.Value:
        """A node's value or a number, in a dtype (None: its own)."""
        if not isinstance(arg, Node):
            if dtype is None:
                raise ExportError(f"the number {arg!r} stands where a tensor is expected")
            return self.b.number(arg, dtype)
        value, own = self.of[arg], dtype_of(arg)
        return value if dtype in (None, own) else self.b.cast(value, dtype)

    def transposed(self, matrix: Node) -> ir.Value:
        """[n, k] as [k, n]: stored so, or turned in the graph."""
        return self.matrices[matrix] if matrix in self.matrices else self.b.transpose(self.of[matrix], 1, 0)

    def optional(self, arg: Any, dtype: torch.dtype | None = None) -> ir.Value | None:
        """As tensor; None stays None: an optional input that is not given."""
        return None if arg is None else self.tensor(arg, dtype)

    def sizes(self, args: Any) -> ir.Value:
        """Numbers and symbolic sizes as i64[n]."""
        return self.b.shape(*(self.of[a] if isinstance(a, Node) else int(a) for a in args))

    def scalar_size(self, arg: Any) -> ir.Value:
        """A size as an i64 scalar."""
        if isinstance(arg, Node):
            return self.b.op("Squeeze", self.of[arg])
        return self.b.number(int(arg), torch.int64)

    def bound(self, arg: Any) -> int | ir.Value:
        """A size as slice takes it."""
        return self.of[arg] if isinstance(arg, Node) else int(arg)


def dtype_of(arg: Any) -> torch.dtype:
    """Of a node's tensor, or of what a Python number or size is."""
    value = arg.meta["val"] if isinstance(arg, Node) else arg
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, (bool, torch.SymBool)):
        return torch.bool
    return torch.int64 if isinstance(value, (int, torch.SymInt)) else torch.float32


def rank_of(node: Node) -> int:
    """How many axes a node's value has."""
    return int(node.meta["val"].dim())


def axis(node: Node, dim: int) -> int:
    """A dimension counted from the front."""
    return dim % max(1, rank_of(node))
