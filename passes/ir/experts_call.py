"""A moec::experts node's arguments by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node


@dataclasses.dataclass(frozen=True)
class ExpertsCall:
    """The arguments of moec::experts, as nodes or constants; see the op for what they mean."""

    x: Node
    weights: Node
    experts: Node
    w_gate_up: Node
    w_down: Node
    b_gate_up: Node | None
    b_down: Node | None
    shared_weight: Node | None
    act: str
    num_shared: int = 0
    weight_on_input: bool = False
    transposed: bool = False
    interleaved: bool = False

    @classmethod
    def of(cls, node: Node) -> ExpertsCall:
        """Reads a call, however its arguments were written."""
        return cls(*node.args, **node.kwargs)  # type: ignore[arg-type]

    @property
    def args(self) -> tuple[Any, ...]:
        """All arguments in order."""
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    @property
    def num_routed(self) -> int:
        """E, without shared experts."""
        return int(self.w_gate_up.meta["val"].shape[0]) - self.num_shared

    @property
    def top_k(self) -> int:
        """K: experts per token, the shared ones not counted."""
        return int(self.experts.meta["val"].shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        """Of the tokens x, and so of the result."""
        return self.x.meta["val"].dtype
