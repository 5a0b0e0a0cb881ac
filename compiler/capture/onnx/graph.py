"""An ONNX graph as plain data: what file.py reads and everything else here works on."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

Size = int | str


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation.

    Args: op: its type; of another domain than ai.onnx with that in front ("com.microsoft.MoE").
          name: as in the file, or the first result where it has none.
          inputs, outputs: names of values; "" for one that is left out.
          attributes: numbers, strings, lists of these, tensors, and graphs (of If).
          layer: the decoder layer that its name or the exporter's metadata tells; None: neither does.
          written: its type in the file, where the graph was rewritten.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    layer: int | None = None
    written: str = ""

    @property
    def reads(self) -> tuple[str, ...]:
        """The values that it reads, those that a graph inside it reads from around it included."""
        inner = (o for a in self.attributes.values() if isinstance(a, Graph) for o in a.outside)
        return (*filter(None, self.inputs), *inner)

    def __str__(self) -> str:
        return f"node {self.name} ({self.written or self.op})"


@dataclasses.dataclass(frozen=True)
class Input:
    """A graph input. shape: numbers, and names of dimensions that are open ("batch_size", "past + 1")."""

    name: str
    dtype: torch.dtype
    shape: tuple[Size, ...]


@dataclasses.dataclass(frozen=True)
class Graph:
    """nodes: in an order in which they can be computed. constants: initializers, by name. opset: of ai.onnx.

    outside: of a graph inside a node: the values that it reads from around it.
    """

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: dict[str, Tensor]
    opset: int
    outside: tuple[str, ...] = ()
