"""Runs the graphs of all ranks in one process: each up to its next collective, which then sums in rank order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from moec.passes.infra.errors import PassError
from moec.passes.infra.rewrite import is_call
from moec.passes.ir.evaluate import Constant, constants, run_nodes
from moec.passes.ir.weights import Read

c10d = torch.ops._c10d_functional


@torch.no_grad()
def run_ranks(graphs: Sequence[GraphModule], inputs: Sequence[Sequence[Any]], read: Read | None) -> list[Any]:
    """The output of every rank's graph.

    Sums are left folds over ranks in the value's own dtype: the same on every rank.

    Raises:
        PassError: one rank stands at a collective while another has ended.
    """
    ranks = [_Rank(g, i, read) for g, i in zip(graphs, inputs, strict=True)]
    while True:
        parts = [r.next_part() for r in ranks]
        if all(p is None for p in parts):
            return [r.output() for r in ranks]
        if any(p is None for p in parts):
            raise PassError("place: some ranks wait at a collective that others never reach")
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        for rank in ranks:
            rank.give(total)


class _Rank:
    """One rank's place in its graph."""

    def __init__(self, gm: GraphModule, inputs: Sequence[Any], read: Read | None) -> None:
        names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
        self.env: dict[str, Any] = dict(zip(names, inputs, strict=True))
        self.constant: Constant = constants(gm, read)
        self.nodes: Iterator[Node] = iter([n for n in gm.graph.nodes if n.op not in ("placeholder", "output")])
        self.result = gm.graph.output_node()
        self.at: Node | None = None

    def next_part(self) -> Tensor | None:
        """Runs up to the next all-reduce and gives its operand; None at the end."""
        for node in self.nodes:
            if is_call(node, c10d.all_reduce.default):
                self.at = node
                return self.env[node.args[0].name]
            if is_call(node, c10d.wait_tensor.default):
                self.env[node.name] = self.env[node.args[0].name]
            else:
                self.env |= run_nodes([node], self.env, self.constant, {node.name})
        return None

    def give(self, total: Tensor) -> None:
        if self.at is not None:
            self.env[self.at.name] = total

    def output(self) -> Any:
        return map_aggregate(self.result.args[0], lambda a: self.env[a.name] if isinstance(a, Node) else a)
