"""Runs the graphs of all ranks in one process: each up to its next collective, which runs once its group is there.

Sums are left folds over the ranks of the group in order, in the value's own dtype: the same on every rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from moec.passes.infra.errors import PassError
from moec.passes.infra.rewrite import is_call
from moec.passes.ir.evaluate import constants, run_nodes
from moec.passes.ir.weights import Read
from moec.passes.placing.collectives import ISSUED, WAIT, c10d, group_name, groups_of


@torch.no_grad()
def run_ranks(graphs: Sequence[GraphModule], inputs: Sequence[Sequence[Any]], read: Read | None) -> list[Any]:
    """The output of every rank's graph.

    Raises:
        PassError: ranks wait for each other for ever; the message says where each one stands.
    Cost: values and weights are dropped after their last use; one weight of each rank is in memory.
    """
    ranks = [_Rank(g, i, read) for g, i in zip(graphs, inputs, strict=True)]
    for rank in ranks:
        rank.advance()
    while any(r.at is not None for r in ranks):
        ready = _ready(ranks)
        if not ready:
            stand = "; ".join(f"rank {i} {r.where()}" for i, r in enumerate(ranks))
            raise PassError(f"place: the ranks wait for each other for ever: {stand}")
        for members in ready:
            nodes = [ranks[m].at for m in members]
            results = _run([n for n in nodes if n is not None], [ranks[m].operands() for m in members])
            for member, result in zip(members, results, strict=True):
                ranks[member].give(result)
                ranks[member].advance()
    return [r.output() for r in ranks]


def _ready(ranks: Sequence[_Rank]) -> list[tuple[int, ...]]:
    """The groups whose every member stands at a collective of that group."""
    standing = {(group_name(r.at), groups_of(r.gm)[group_name(r.at)]) for r in ranks if r.at is not None}
    found = []
    for name, members in sorted(standing):
        at = [ranks[m].at for m in members]
        if all(node is not None and group_name(node) == name for node in at):
            found.append(members)
    return found


class _Rank:
    """One rank's place in its graph. at: the collective that it stands at, None at the end."""

    def __init__(self, gm: GraphModule, inputs: Sequence[Any], read: Read | None) -> None:
        names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
        self.gm, self.env = gm, dict(zip(names, inputs, strict=True))
        self.constant = constants(gm, read)
        self.uses = Counter(p.name for n in gm.graph.nodes for p in n.all_input_nodes)
        self.nodes = iter([n for n in gm.graph.nodes if n.op == "call_function"])
        self.at: Node | None = None

    def advance(self) -> None:
        """Runs up to the next collective."""
        self.at = None
        for node in self.nodes:
            if is_call(node, *ISSUED):
                self.at = node
                return
            value = self._value(node.args[0]) if is_call(node, WAIT) else self._call(node)
            self._set(node, value)

    def _call(self, node: Node) -> Any:
        given = {p.name: self._value(p) for p in node.all_input_nodes}
        return run_nodes([node], given, self.constant, {node.name})[node.name]

    def _value(self, node: Any) -> Any:
        """A node's value; weights are made when they are read."""
        return self.env[node.name] if node.op != "get_attr" else self.constant(str(node.target))

    def _set(self, node: Node, value: Any) -> None:
        if self.uses[node.name]:
            self.env[node.name] = value
        for p in node.all_input_nodes:
            self.uses[p.name] -= 1
            if not self.uses[p.name]:
                self.env.pop(p.name, None)

    def operands(self) -> tuple[Any, ...]:
        """The arguments of the collective that the rank stands at."""
        if self.at is None:
            raise PassError("place: a rank that has ended has no collective")
        return map_aggregate(self.at.args, lambda a: self._value(a) if isinstance(a, Node) else a)  # type: ignore[return-value]

    def give(self, result: Any) -> None:
        if self.at is not None:
            self._set(self.at, result)

    def where(self) -> str:
        return "has ended" if self.at is None else f"at {self.at.name} of {group_name(self.at)}"

    def output(self) -> Any:
        result = self.gm.graph.output_node().args[0]
        return map_aggregate(result, lambda a: self._value(a) if isinstance(a, Node) else a)


def _run(nodes: Sequence[Node], operands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The results of one collective, in the order of the group's ranks. Raises: PassError: ranks run different ones."""
    targets = {n.target for n in nodes}
    if targets == {c10d.isend.default, c10d.irecv.default}:
        sent = next(o[0] for n, o in zip(nodes, operands, strict=True) if n.target is c10d.isend.default)
        return [sent.new_empty(0) if n.target is c10d.isend.default else sent.clone() for n in nodes]
    run = _MEANINGS.get(nodes[0].target)
    if len(targets) > 1 or run is None:
        raise PassError(f"place: the ranks of {group_name(nodes[0])} run {sorted(n.name for n in nodes)} together")
    return run([o[0] for o in operands], operands)


def _all_reduce(parts: Sequence[Tensor], _: object) -> list[Tensor]:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return [total] * len(parts)


def _all_gather(parts: Sequence[Tensor], _: object) -> list[Tensor]:
    return [torch.cat(list(parts))] * len(parts)


def _all_to_all(parts: Sequence[Tensor], operands: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """Raises: PassError: a rank expects another number of rows than its peer sends."""
    expected, sizes = [list(o[1]) for o in operands], [list(o[2]) for o in operands]
    sent = [p.split(s) for p, s in zip(parts, sizes, strict=True)]
    for receiver, wanted in enumerate(expected):
        for sender, rows in enumerate(wanted):
            if sizes[sender][receiver] != rows:
                raise PassError(
                    f"place: rank {receiver} of the group expects {rows} rows of rank {sender}, which sends "
                    f"{sizes[sender][receiver]}"
                )
    return [torch.cat([pieces[r] for pieces in sent]) for r in range(len(parts))]


_MEANINGS: dict[Any, Callable[..., list[Tensor]]] = {
    c10d.all_reduce.default: _all_reduce,
    c10d.all_gather_into_tensor.default: _all_gather,
    c10d.all_to_all_single.default: _all_to_all,
}
