"""Graphs written by hand, without a capture: for tests of what passes are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import moec.passes.ir.ops  # noqa: F401  (registers torch.ops.moec)
from moec.passes.infra.rewrite import call
from moec.passes.ir.weights import source, weight_node


class Builder:
    """Grows a graph module: b.input("x", 8) is [T, 8]; b.weight("w", 4, 8); b(op, *args); b.done(*outputs)."""

    def __init__(self) -> None:
        self.gm = GraphModule(torch.nn.Module(), Graph())
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        self._rows = self.mode.from_tensor(torch.empty(5), symbolic_context=context).shape[0]

    def input(self, name: str, *trailing: int, dtype: torch.dtype = torch.float32) -> Node:
        """[T, ..] of a symbolic T."""
        node = self.gm.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(self._rows, *trailing, dtype=dtype)
        return node

    def weight(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Node:
        return weight_node(self.gm, name, source(name, shape, dtype))

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        return call(self.gm.graph, op, args, kwargs)

    def done(self, *outputs: Node) -> GraphModule:
        self.gm.graph.output(outputs if len(outputs) > 1 else outputs[0])
        self.gm.recompile()
        return self.gm


def tensors(**named: Tensor) -> Any:
    """A `read` over given tensors."""
    return named.__getitem__
