"""What a pass is, what it gets and what it gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch

import moec.passes.ir.ops  # noqa: F401  (registers torch.ops.moec, which every pass names)
from moec.passes.ir.weights import Read


@dataclasses.dataclass(frozen=True)
class Match:
    """One site that a pass rewrote. node: the name of the value that now stands for it. layer: None outside layers."""

    node: str
    layer: int | None = None
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class NoMatch:
    """One site that a pass looked at and left alone, and why."""

    reason: str
    node: str
    layer: int | None = None


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Every site that a pass looked at."""

    matched: tuple[Match, ...] = ()
    refused: tuple[NoMatch, ...] = ()

    @property
    def sites(self) -> int:
        """How many were looked at: matched and refused."""
        return len(self.matched) + len(self.refused)

    @classmethod
    def of(cls, entries: list[Match | NoMatch]) -> Ledger:
        """The ledger of a pass's findings; each kind keeps its order."""
        return cls(
            tuple(e for e in entries if isinstance(e, Match)), tuple(e for e in entries if isinstance(e, NoMatch))
        )


@dataclasses.dataclass(frozen=True)
class PassContext:
    """What passes may know beside the graph.

    read: the checkpoint's tensors by name (for evidence and for folding), None where weights are random or absent.
    options: frozen options of single passes, by pass name.
    """

    read: Read | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PassResult:
    """graph: the rewritten module (the same object where it was changed in place). changed: the truth."""

    graph: torch.fx.GraphModule
    changed: bool
    ledger: Ledger


class Pass(Protocol):
    """One rewrite. `name` is the file's name with dashes; see docs/architecture.md, "Add a pass"."""

    @property
    def name(self) -> str:
        """The file's name with dashes, under which it stands in ledgers, dumps and errors."""

    def run(self, gm: torch.fx.GraphModule, context: PassContext) -> PassResult:
        """The rewritten graph (gm may be changed itself), whether anything changed, every site that was looked at."""


def layer_of(node: torch.fx.Node) -> int | None:
    """The decoder layer that a node belongs to (node.meta["layer"], set by capture), None outside layers."""
    return node.meta.get("layer")
