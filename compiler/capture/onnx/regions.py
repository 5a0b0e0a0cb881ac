"""Where a graph has a MoE block: from the value of the rows to the value in which all paths from a choice have met.

Everything in between, whatever it is made of, becomes a module of its own (code.py), which is then lifted as any block
of plain Python is: measured, not read (compiler/capture/lifting).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from moec.compiler.capture.onnx.graph import Graph, Node
from moec.compiler.capture.onnx.observe import Run, Seen

CHOOSING = ("TopK", "ArgMax")
LARGEST = 60000  # nodes of one region


@dataclasses.dataclass(frozen=True)
class Region:
    """A block: rows -> result, of equal shape but for leading axes.

    nodes: in order.  num_experts: the scores that the choice is made from.  sizes: values of the host that lie outside,
    each as expressions over `s`, the shape of the rows (a list of them, or one).
    """

    rows: str
    result: str
    nodes: tuple[Node, ...]
    num_experts: int
    sizes: dict[str, Any]
    layer: int | None


def regions(graph: Graph, runs: list[Run]) -> list[Region]:
    """The blocks of a graph, in order, that do not overlap.

    runs: two, with other sizes for every open dimension, from which expressions for sizes are told.
    """
    finder = _Finder(graph, runs)
    found: list[Region] = []
    taken: set[str] = set()
    for position, node in enumerate(graph.nodes):
        if node.op in CHOOSING and node.outputs[0] not in taken:
            region = finder.region(position)
            if region is not None and not any(o in taken for n in region.nodes for o in n.outputs):
                found.append(region)
                taken.update(o for n in region.nodes for o in n.outputs)
    return found


class _Finder:
    def __init__(self, graph: Graph, runs: list[Run]) -> None:
        self.graph, self.runs = graph, runs
        self.seen = runs[0].values
        self.place = {o: i for i, n in enumerate(graph.nodes) for o in n.outputs if o}
        self.uses: dict[str, int] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self.uses[name] = self.uses.get(name, 0) + 1

    def region(self, start: int) -> Region | None:
        """The smallest block around the choice at a position."""
        choice = self.graph.nodes[start]
        scores = self.seen[choice.inputs[0]].shape
        if not scores or len(scores) < 2 or scores[-1] < 2:
            return None
        for result in self.meetings(start):
            if not self._rows_like(result):
                continue
            for rows, inner in self.entries(result, start):
                if self._same_rows(rows, result) and self._has_experts(inner):
                    return self._region(rows, result, inner)
        return None

    def meetings(self, start: int) -> Iterator[str]:
        """Values that every path from a node passes, in order; to be a result of the graph is no path."""
        nodes = self.graph.nodes
        waiting = {o: self.uses[o] for o in nodes[start].outputs if self.uses.get(o)}
        for node in nodes[start + 1 : start + LARGEST]:
            mine = [i for i in node.inputs if i in waiting]
            if not mine:
                continue
            for name in mine:
                waiting[name] -= 1
                if not waiting[name]:
                    del waiting[name]
            made = {o: self.uses[o] for o in node.outputs if self.uses.get(o)}
            ends = not made and not waiting
            waiting |= made
            if (len(waiting) == 1 and made) or ends:
                yield node.outputs[0]

    def entries(self, result: str, start: int) -> Iterator[tuple[str, set[int]]]:
        """Values through which alone inputs reach the result, the nearest first, and the nodes between the two.

        Only those before the choice; what reaches it as numbers of the host does not count.
        """
        frontier, inner = {result}, set[int]()
        while frontier:
            last = max(frontier, key=lambda v: self.place.get(v, -1))
            at = self.place.get(last, -1)
            if at < 0 or len(inner) > LARGEST:
                return  # an input of the graph is reached, and others with it
            frontier -= set(self.graph.nodes[at].outputs)
            inner.add(at)
            frontier |= {i for i in self.graph.nodes[at].inputs if self._moves(i)}
            if len(frontier) == 1 and start in inner:
                yield next(iter(frontier)), set(inner)

    def _moves(self, name: str) -> bool:
        """Whether a value is a tensor that is no constant."""
        return bool(name) and name not in self.graph.constants and not self.seen[name].on_host

    def _rows_like(self, name: str) -> bool:
        value = self.seen[name]
        return value.shape is not None and len(value.shape) >= 2 and bool(value.dtype and value.dtype.is_floating_point)

    def _same_rows(self, rows: str, result: str) -> bool:
        """Whether two values hold as many rows of one width, in both runs."""
        if not self._rows_like(rows):
            return False
        for run in self.runs:
            a, b = _shape(run.values[rows]), _shape(run.values[result])
            if a[-1] != b[-1] or _count(a) != _count(b):
                return False
        return self.runs[0].values[rows].dtype == self.runs[0].values[result].dtype

    def _has_experts(self, inner: set[int]) -> bool:
        """Whether there are weights enough: those of a router, and of two products."""
        held = {i for at in inner for i in self.graph.nodes[at].inputs if _is_weight(self.graph.constants.get(i))}
        ranks = [self.graph.constants[n].dim() for n in held]
        return len(held) >= 3 and (len(held) > 4 or max(ranks) > 2)

    def _region(self, rows: str, result: str, inner: set[int]) -> Region | None:
        """With the numbers of the host that it needs; None where one is no size of the rows.

        Of several choices (groups of experts, then experts) the widest is that of the experts.
        """
        chosen_from = [self.graph.nodes[at].inputs[0] for at in inner if self.graph.nodes[at].op in CHOOSING]
        num_experts = max(_shape(self.seen[name])[-1] for name in chosen_from)
        tensors = {rows} | {o for at in inner for o in self.graph.nodes[at].outputs}
        known = {"", *tensors}
        sizes: dict[str, Any] = {}
        todo = [i for at in inner for i in self.graph.nodes[at].inputs]
        while todo:
            name = todo.pop()
            if name in known or name in self.graph.constants:
                continue
            known.add(name)
            at = self.place.get(name)
            sources = self._sources(name)
            fitted = self._fitted(name, rows) if sources and not sources & tensors else None
            if fitted is not None:
                sizes[name] = fitted
            elif at is None or any(self._moves(i) and i not in tensors for i in self.graph.nodes[at].inputs):
                return None
            else:
                inner.add(at)
                known.update(self.graph.nodes[at].outputs)
                todo += self.graph.nodes[at].inputs
        nodes = tuple(self.graph.nodes[at] for at in sorted(inner))
        layers = [n.layer for n in nodes if n.layer is not None]
        return Region(rows, result, nodes, num_experts, sizes, max(layers, key=layers.count) if layers else None)

    def _sources(self, name: str) -> set[str]:
        """The tensors whose sizes a number of the host follows from."""
        found, todo, known = set[str](), [name], set[str]()
        while todo:
            at = self.place.get(todo.pop())
            for i in () if at is None else self.graph.nodes[at].inputs:
                if i and i not in known and i not in self.graph.constants:
                    known.add(i)
                    if self.seen[i].on_host:
                        todo.append(i)
                    else:
                        found.add(i)
        return found

    def _fitted(self, name: str, rows: str) -> Any:
        """A number of the host, or a list of them, as expressions over the shape of the rows; None: it is none."""
        observed = [(r.values[name].number, _shape(r.values[rows])) for r in self.runs]
        if any(not isinstance(v, int | list) for v, _ in observed):
            return None
        if isinstance(observed[0][0], int):
            return _expression([(v, s) for v, s in observed])
        count = len(observed[0][0])
        parts = [_expression([(v[i], s) for v, s in observed]) for i in range(count)]
        return None if None in parts or any(len(v) != count for v, _ in observed) else parts


def _expression(observed: list[tuple[Any, tuple[int, ...]]]) -> str | None:
    """An integer as an axis, a product of leading axes, or a constant, in both runs."""
    rank = len(observed[0][1])
    options = [(f"s[{i}]", lambda s, i=i: s[i]) for i in range(rank - 1)]
    options += [(" * ".join(f"s[{j}]" for j in range(i)), lambda s, i=i: _count(s[:i])) for i in range(2, rank)]
    for text, value in options:
        if all(value(s) == n for n, s in observed):
            return text
    numbers = {n for n, _ in observed}
    return repr(numbers.pop()) if len(numbers) == 1 else None


def _shape(value: Seen) -> tuple[int, ...]:
    assert value.shape is not None
    return value.shape


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _is_weight(value: Tensor | None) -> bool:
    return value is not None and value.is_floating_point() and value.dim() >= 2
