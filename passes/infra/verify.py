"""Cut and verify: single-entry regions found by dataflow, run on probe tensors, compared with what a candidate gives.

A spec read from a region is only a guess. It is accepted when the region and the op that would replace it give the same
values on probes; how a model spells the arithmetic then does not matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from moec.passes.infra.rewrite import in_order, symbolic
from moec.passes.ir.evaluate import run_nodes

PROBE_TOKENS = 3  # every symbolic size of a probe
SCALES = (1.0, 1e-3, 30.0, 1e4, 0.0)  # of the random probes; 0: all zeros


@dataclasses.dataclass(frozen=True)
class Cut:
    """A region with one moving input. nodes: in order, the output last; weights: the get_attr nodes that it reads;
    leaves: the other outside values (sizes, and what the caller declared a leaf)."""

    entry: Node
    nodes: tuple[Node, ...]
    weights: tuple[Node, ...]
    leaves: tuple[Node, ...]

    @property
    def output(self) -> Node:
        """The node whose value the region is for."""
        return self.nodes[-1]


def constant_nodes(gm: GraphModule) -> set[Node]:
    """The get_attr nodes and the calls that depend on nothing else (no input, no size). Cost: linear in the graph."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and all(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def single_entries(
    output: Node, constants: Collection[Node], leaf: Callable[[Node], bool] = lambda n: False, limit: int = 40
) -> Iterator[Cut]:
    """The regions that end in `output` and read one moving value, the smallest first.

    Walks back from `output`, the latest node first; each time one value is left to be computed, that value is an entry.
    Constants and sizes do not move; leaf(node): nor does this node. Ends at a placeholder or after `limit` nodes.
    """
    inside: list[Node] = []
    fixed: dict[Node, None] = {}
    frontier = {output}
    while frontier:
        node = max(frontier, key=lambda n: n._sort_key)
        frontier.remove(node)
        if node.op != "call_function" or len(inside) == limit:
            return
        inside.append(node)
        for producer in node.all_input_nodes:
            if producer in constants or leaf(producer) or not _is_data(producer):
                fixed[producer] = None
            else:
                frontier.add(producer)
        if len(frontier) == 1:
            (entry,) = frontier
            yield _finish(entry, inside, fixed, constants)


def _finish(entry: Node, inside: list[Node], fixed: Iterable[Node], constants: Collection[Node]) -> Cut:
    """Draws the constant subexpressions in, down to the weights themselves."""
    drawn = dict.fromkeys(inside)
    weights: dict[Node, None] = {}
    leaves: dict[Node, None] = {}
    todo = list(fixed)
    while todo:
        node = todo.pop()
        if node.op == "get_attr":
            weights[node] = None
        elif node not in constants:
            leaves[node] = None
        elif node not in drawn:
            drawn[node] = None
            todo += node.all_input_nodes
    return Cut(entry, tuple(in_order(drawn)), tuple(in_order(weights)), tuple(in_order(leaves)))


def _is_data(node: Node) -> bool:
    return not isinstance(node.meta.get("val"), (torch.SymInt, int))


def run(nodes: Iterable[Node], values: Mapping[Node, Any], output: Node) -> Any:
    """Executes calls in order from known values and gives the value of `output`; sizes get their probe value."""
    order = list(nodes)
    given = {n.name: v for n, v in values.items()}
    for node in {p for n in order for p in n.all_input_nodes if not _is_data(p)}:
        given.setdefault(node.name, concrete(node.meta["val"]))
    return run_nodes(order, given, _no_constant, (output.name,))[output.name]


def _no_constant(name: str) -> Tensor:
    raise KeyError(f"a cut reads {name}, which was not given")


def concrete(size: Any) -> int:
    """A size with every symbol at PROBE_TOKENS."""
    expression = symbolic(size)
    if isinstance(expression, int):
        return expression
    return int(expression.subs(dict.fromkeys(expression.free_symbols, PROBE_TOKENS)))


def random_like(node: Node, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """A normal random tensor of a node's shape and dtype (both signs), times `scale`."""
    fake = node.meta["val"]
    shape = [concrete(n) for n in fake.shape]
    return (torch.randn(shape, generator=generator) * scale).to(fake.dtype)


EXACT, CLOSE = 0, 1


def agreement(expected: Any, got: Any) -> int | None:
    """EXACT: the same bits (NaN equal to NaN); CLOSE: the same up to the order of float32 operations; None: different.

    CLOSE is 4 units of the last place of the greatest value for float32 and wider. For bf16 and f16 it is one unit of
    each value, in at most 2% of the values: a rounding that a last-bit difference in float32 tips over is rare, while
    a rounding step too many or too few shows in a quarter of the values.
    """
    if not isinstance(got, Tensor) or expected.dtype != got.dtype or expected.shape != got.shape:
        return None
    same = (expected == got) | (expected.isnan() & got.isnan())
    if bool(same.all()):
        return EXACT
    if not expected.is_floating_point() or not bool((expected.isfinite() & got.isfinite() | same).all()):
        return None
    unit = torch.finfo(expected.dtype).eps
    gap, size = (expected.double() - got.double()).abs(), expected.double().abs()
    if expected.dtype in (torch.bfloat16, torch.float16):
        near = (gap <= unit * size)[~same].all() and (~same).sum() <= 0.02 * same.numel()
    else:
        near = (gap[~same] <= 4 * unit * size[size.isfinite()].max()).all()
    return CLOSE if bool(near) else None


def kind_of(cut: Cut, *more: Node) -> Hashable:
    """What two structurally equal cuts share: targets, constants, dataflow, shapes and dtypes. A memo's key."""
    place = {n: i for i, n in enumerate((cut.entry, *cut.weights, *cut.leaves, *more, *cut.nodes))}
    outside = (cut.entry, *cut.weights, *cut.leaves, *more)

    def arg(a: Any) -> Any:
        return map_arg(a, lambda n: f"%{place[n]}" if n in place else n.name)

    types = tuple(str(n.meta.get("val")) if not _is_data(n) else type_text(n) for n in outside)
    calls = tuple((str(n.target), repr(arg(n.args)), repr(arg(n.kwargs))) for n in cut.nodes)
    return types, calls


def type_text(node: Node) -> str:
    """A tensor node's dtype and shape as text, sizes symbolic."""
    fake = node.meta["val"]
    return f"{fake.dtype}{[str(symbolic(n)) for n in fake.shape]}"
