"""Finds where experts are spelled out in ATen: from a choice of experts to the value in which all of them have met."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moec.passes.infra.rewrite import FIRST_IS_TEMPLATE, PRODUCTS, calls, cut, differing, is_call, num_elements
from moec.passes.infra.verify import Cut, single_entries

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Choice:
    """A top-k over E experts. indices: int [.., K], or [..] of an argmax. logits: the products that it follows from."""

    topk: Node
    indices: Node
    top_k: int
    num_experts: int
    logits: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class ExpertsRegion:
    """cut.entry: x; cut.output: y, as many numbers as x; cut.leaves: the logits and sizes. constants: what the region
    reads of the weights, in order of use."""

    cut: Cut
    choice: Choice
    constants: tuple[Node, ...]


def choices(gm: GraphModule) -> Iterator[Choice]:
    """The top-k calls over one axis of experts whose result is not already a moec op's routing."""
    for node in calls(gm, aten.topk.default, aten.max.dim, aten.argmax.default):
        scores = node.args[0]
        val = scores.meta["val"]  # type: ignore[union-attr]
        count = val.shape[-1] if val.dim() >= 2 and val.dtype.is_floating_point else None
        if not isinstance(count, int) or count < 2 or not _over_last_axis(node, val):
            continue
        region = cut((node,), lambda n: n.target in PRODUCTS)
        if region is None or any(n.target in PRODUCTS for n in region.nodes):
            continue
        indices: Node | None = node
        if node.target is not aten.argmax.default:
            indices = next((u for u in node.users if is_call(u, operator.getitem) and u.args[1] == 1), None)
        if indices is not None:
            top_k = int(node.args[1]) if node.target is aten.topk.default else 1  # type: ignore[arg-type]
            yield Choice(node, indices, top_k, count, region.inputs)


def _over_last_axis(node: Node, val: Tensor) -> bool:
    at = 2 if node.target is aten.topk.default else 1
    dim = node.args[at] if len(node.args) > at else -1 if at == 2 else None
    return dim in (-1, val.dim() - 1)


def regions(choice: Choice, constants: Collection[Node]) -> Iterator[ExpertsRegion | str]:
    """Candidate regions, the smallest first; a str: why there is none (or ""  where this is no experts site)."""
    limit = 200 + 40 * choice.num_experts
    leaves = set(choice.logits)
    for output in meetings(choice.topk, limit):
        if getattr(output.target, "namespace", "") == "moec":
            yield ""
            return
        if not _is_hidden(output):
            continue
        for found in single_entries(output, constants, lambda n: n in leaves or n.target in FIRST_IS_TEMPLATE, limit):
            if not _same_count(found.entry, output) or not leaves <= set(found.leaves):
                continue
            used = _constants_used(found, constants)
            if sum(n.meta["val"].dim() > 1 for n in used) >= 2:
                yield ExpertsRegion(found, choice, used)
                break
    yield "no value that every path from the choice passes is a function of one value and the routing"


def meetings(start: Node, limit: int) -> Iterator[Node]:
    """Values that every path from `start` to the graph's results passes, in order (a direct result is no path)."""
    reached, waiting, node = {start}, {start: _uses(start)}, start
    for _ in range(limit):
        node = node.next
        if node.op == "output":
            return
        mine = [p for p in node.all_input_nodes if p in reached]
        if not mine:
            continue
        reached.add(node)
        for p in mine:
            waiting[p] -= 1
            if not waiting[p]:
                del waiting[p]
        uses = _uses(node)
        if uses:
            waiting[node] = uses
        if not waiting.keys() - {node}:
            yield node


def _uses(node: Node) -> int:
    return sum(u.op != "output" for u in node.users)


def _is_hidden(node: Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.dtype.is_floating_point and val.dim() >= 2


def _same_count(a: Node, b: Node) -> bool:
    """Whether two values hold rows of one width, equally many (in one shape, or as rows)."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or not x.dtype.is_floating_point or x.dim() < 2:
        return False
    if x.shape[-1] != y.shape[-1]:
        return False
    return bool(num_elements(a) == num_elements(b)) and (y.dim() == 2 or differing(x, y.to(x.dtype)) is None)


def _constants_used(found: Cut, constants: Collection[Node]) -> tuple[Node, ...]:
    """The weights, or constant views of them, that moving values meet, in order of use."""
    used: dict[Node, None] = {}
    for n in found.nodes:
        if n not in constants:
            for p in n.all_input_nodes:
                if p in constants and p.meta["val"].dtype.is_floating_point:
                    used[p] = None
    return tuple(used)
