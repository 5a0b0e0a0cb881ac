"""Turns what lies between the read and the write of a state into one moec::recurrence.

Before: s = moec::state_read(cache, slots); new = s * decay + update; moec::state_write(cache, slots, new); y = new @ q
After:  [y] = moec::recurrence([decay, update, q], [], [cache], slots, body)

In the body: every node on a path from the read to the write; of what else follows from the state as much as makes the
values that leave the body smallest (a reading of the state, not the state); and what blows its operands up, such as
an outer product. Products with weights stay outside unless the state itself goes through one, so that they run over
all tokens at once.
Needs: a clean graph. Gives: a graph without state_read and state_write.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moec.compiler.capture.sizes import expression
from moec.compiler.capture.states import state_read, state_write
from moec.compiler.errors import UnsupportedModel
from moec.passes.infra.rewrite import call, calls, in_order, remove_dead, weighs
from moec.passes.ir.body import encode_body

READ, WRITE = state_read._opoverload, state_write._opoverload
BLOWN_UP = 4  # how many times larger than its operands a value must be to be made inside the body
LONGEST_CHAIN = 8  # how many nodes back the operands of such a value are looked for
MOST_EXTRAS = 64  # of what follows from the state, how many nodes may join the body


def cut_recurrences(gm: GraphModule) -> None:
    """Rewrites the graph in place. Raises: UnsupportedModel: a state's recurrence has no body of its own."""
    for write in calls(gm, WRITE):
        _cut(gm, write)
    remove_dead(gm)
    left = next(calls(gm, READ), None)
    if left is not None:
        raise UnsupportedModel(f"layer {left.meta.get('layer')}: it reads a state that it never writes")
    gm.graph.lint()


def _cut(gm: GraphModule, write: Node) -> None:
    cache, slots, value = write.args
    reads = [n for n in cache.users if n.target is READ and n.users]  # type: ignore[union-attr]
    gm.graph.erase_node(write)
    if reads:
        _Recurrence(gm, reads[0], value).replace(cache, slots)


class _Recurrence:
    """One state between its read and its new value. inside: the nodes of the body."""

    def __init__(self, gm: GraphModule, read: Node, value: Any) -> None:
        self.gm, self.read, self.value = gm, read, value
        self.layer = read.meta.get("layer")
        self.rows = expression(read.meta["val"].shape[0])
        self.after = _reached([read], lambda n: n.users)
        before = _reached([value], lambda n: n.all_input_nodes) | {value}
        self.inside = self.after & before
        bad = next((n for n in in_order(self.inside) if not self._may_enter(n, weighing=True)), None)
        if bad is not None:
            raise UnsupportedModel(f"layer {self.layer}: its state goes through {bad.name} ({bad.target})")
        self.inside |= self._best_extras()
        self._absorb()

    def replace(self, cache: Any, slots: Any) -> None:
        """Puts the op in the place of the nodes inside."""
        nodes, operands = in_order(self.inside), self._operands()
        inputs = [n for n in operands if self._has_rows(n)]
        constants = [n for n in operands if n not in inputs]
        outputs = self._leaving(self.inside)
        try:
            body = encode_body(inputs, constants, [self.read], nodes, outputs, [self.value], self.rows)
        except ValueError as error:
            raise UnsupportedModel(f"layer {self.layer}: its recurrence has no body: {error}") from error
        last = in_order([*self.inside, *operands, self.read])[-1]
        early = [n for n in in_order(self.after - self.inside) if n < last]
        with self.gm.graph.inserting_before(last.next):
            args = (inputs, constants, [cache], slots, body)
            op = call(self.gm.graph, torch.ops.moec.recurrence.default, args, like=self.read)
            made = [call(self.gm.graph, operator.getitem, (op, i), like=self.read) for i in range(len(outputs))]
        for old, new in zip(outputs, made, strict=True):
            old.replace_all_uses_with(new, lambda user: user not in self.inside, propagate_meta=False)
        for at, node in itertools.pairwise([[op, *made][-1], *early]):  # they read what the op gives
            at.append(node)

    def _operands(self) -> list[Node]:
        """What the body reads from outside, sizes left out."""
        known = {*self.inside, self.read}
        read = [a for n in in_order(self.inside) for a in n.all_input_nodes] + [self.value]
        return list(dict.fromkeys(a for a in read if a not in known and not isinstance(a.meta["val"], torch.SymInt)))

    def _leaving(self, inside: set[Node]) -> list[Node]:
        """The values of the body that others read."""
        return [n for n in in_order({*inside, self.read}) if any(u not in inside for u in n.users)]

    def _may_enter(self, node: Node, weighing: bool = False) -> bool:
        """Whether a node can be part of the body. weighing: products with weights can."""
        if node.op != "call_function" or node.meta.get("layer") != self.layer or (not weighing and weighs(node)):
            return False
        schema = getattr(node.target, "_schema", None)
        plain = node.target is operator.getitem or getattr(node.target, "namespace", "") == "aten"
        return plain and not (schema is not None and schema.is_mutable)

    def _best_extras(self) -> set[Node]:
        """What follows from the state and joins the body, such that the least leaves it.

        Raises: UnsupportedModel: whatever joins, something leaves that has no row for each token.
        """
        shut: set[Node] = set()
        open_: list[Node] = []
        for node in in_order(self.after - self.inside):
            if len(open_) == MOST_EXTRAS:
                break
            if not self._may_enter(node) or shut.intersection(node.all_input_nodes):
                shut.add(node)
            else:
                open_.append(node)
        costs = [self._cost(self._leaving({*self.inside, *open_[:k]})) for k in range(len(open_) + 1)]
        best = min(costs)
        if best == math.inf:
            raise UnsupportedModel(f"layer {self.layer}: what its recurrence gives has no row for each token")
        return set(open_[: costs.index(best)])

    def _cost(self, values: Iterable[Node]) -> float:
        """Bytes of a row of all values; infinite where one has no rows."""
        return sum(self._row_bytes(n) if self._has_rows(n) else math.inf for n in values)

    def _absorb(self) -> None:
        """Takes in operands without rows of their own, and those that are much larger than what they are made of."""
        todo = self._operands()
        while todo:
            node = todo.pop()
            if node in self.inside or not _is_symbolic(node) or not self._may_enter(node):
                continue
            taken = self._blown_up(node) if self._has_rows(node) else {node}
            self.inside |= taken
            todo += [a for n in taken for a in n.all_input_nodes]

    def _blown_up(self, node: Node) -> set[Node]:
        """The node and what it is made of, back to operands that are much smaller; empty where there are none such."""
        cone = {node}
        for _ in range(LONGEST_CHAIN):
            if any(u not in cone and u not in self.inside for n in cone for u in n.users):
                break  # it would be computed twice
            read = dict.fromkeys(a for n in cone for a in n.all_input_nodes)
            sources = [a for a in read if a not in cone and _is_symbolic(a)]
            if not sources or self._row_bytes(node) > BLOWN_UP * self._cost(sources):
                return cone
            largest = max((a for a in sources if self._has_rows(a)), key=self._row_bytes, default=None)
            if largest is None or not self._may_enter(largest):
                break
            cone.add(largest)
        return set()

    def _has_rows(self, node: Node) -> bool:
        val = node.meta["val"]
        return isinstance(val, Tensor) and val.dim() > 0 and expression(val.shape[0]) == self.rows

    @staticmethod
    def _row_bytes(node: Node) -> int:
        val = node.meta["val"]
        return math.prod(int(d) for d in val.shape[1:]) * val.dtype.itemsize


def _is_symbolic(node: Node) -> bool:
    """Whether a value's size depends on the number of tokens."""
    val = node.meta.get("val")
    if isinstance(val, list | tuple):
        return True
    return isinstance(val, Tensor) and any(isinstance(d, torch.SymInt) for d in val.shape)


def _reached(start: Iterable[Node], follow: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Everything that is reached from the start, which itself is left out."""
    found: set[Node] = set()
    todo = list(start)
    while todo:
        for node in follow(todo.pop()):
            if node not in found:
                found.add(node)
                todo.append(node)
    return found
