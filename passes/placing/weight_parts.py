"""Parts of stored weights: what cutting a weight for a rank needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import GraphModule, Node

from moec.passes.ir.activation import Activation
from moec.passes.ir.weights import concat, slice_, weight_node, weights_of
from moec.passes.placement.rank_shares import Span


def cut(gm: GraphModule, old: Node, dim: int, ranges: Sequence[tuple[int, int]], at: Node) -> Node:
    """A get_attr node, before `at`, for the concatenation of ranges of a stored weight along `dim`; the weight itself
    where that is all of it."""
    weight = weights_of(gm)[str(old.target)]
    if list(ranges) == [(0, weight.shape[dim])]:
        return old
    parts = [slice_(weight, dim, start, stop) for start, stop in ranges]
    with gm.graph.inserting_before(at):
        return weight_node(gm, f"{old.target}_part", parts[0] if len(parts) == 1 else concat(parts, dim))


def runs(numbers: Iterable[int], size: int = 1) -> list[tuple[int, int]]:
    """Items of `size` each, by number, as half-open ranges; neighbours in the order given are one range."""
    found: list[tuple[int, int]] = []
    for n in numbers:
        if found and found[-1][1] == n * size:
            found[-1] = (found[-1][0], (n + 1) * size)
        else:
            found.append((n * size, (n + 1) * size))
    return found


def gate_up_ranges(span: Span, act: str) -> list[tuple[int, int]]:
    """The columns of an input projection whose gate half, where it has one, comes first."""
    kept = [(span.start, span.stop)]
    return [*kept, (span.total + span.start, span.total + span.stop)] if Activation.parse(act).gated else kept
