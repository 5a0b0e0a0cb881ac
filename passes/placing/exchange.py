"""Tokens to the ranks that hold their experts and back, where ranks attend to different sequences.

A token goes once to every rank of every group that one of its experts is taken from; there its weighted sum over that
rank's experts and columns is computed, and the token's own rank adds up what comes back, in the order of the ranks and
in float32. Only tokens `part` of `parts` (by number, in turn) are sent, so that the ranks of a lane send each token
once, and chunks can run one behind the other. Shapes: T tokens here, K experts per token, R ranks of the stage, S rows
sent, S' rows received.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node

from moec.passes.infra.errors import PassError
from moec.passes.infra.rewrite import call
from moec.passes.ir.experts_call import ExpertsCall
from moec.passes.ir.text import symbol_letters
from moec.passes.ir.weights import literal, named, weight_node
from moec.passes.placement.rank_shares import Residency
from moec.passes.placing.collectives import Group, c10d, issue, wait

aten, moec = torch.ops.aten, torch.ops.moec
TURN = 0.6180339887498949
"""Token number n takes the copy in whose part of [0, 1) the fraction of n * TURN lies: every run of tokens is spread
almost as the parts say (golden ratio sequence)."""


def split_sizes(counts: Tensor) -> list[int]:
    """i64[R] -> numbers of rows, on the host: the sizes of an all-to-all."""
    return [int(n) for n in counts.tolist()]


@dataclass(frozen=True)
class Exchange:
    """What an exchange is built from.

    Args:
        experts: the call over this rank's stacks; its x, weights and experts are the rank's own tokens'.
        residency: of the layer. rank: this rank's number in the stage. group: the stage.
        part, parts: which tokens this rank sends.
    """

    experts: ExpertsCall
    residency: Residency
    rank: int
    group: Group
    part: int = 0
    parts: int = 1

    def chunk(self, index: int, count: int) -> Exchange:
        """The exchange of every count-th of its tokens."""
        return replace(self, part=self.part + index * self.parts, parts=self.parts * count)

    @property
    def num_experts(self) -> int:
        """Routed experts of the layer, wherever they are held."""
        return len(self.residency.copies)


@dataclass(frozen=True)
class Routed:
    """What is the same for all chunks: groups i64[T, K] of the chosen experts, chosen i64[T, K], and token numbers."""

    chosen: Node
    groups: Node
    number: Node


@dataclass(frozen=True)
class Sent:
    """Rows under way. token: i64[S]; sent, received: numbers of rows; waits: where rows and routes [S', 2K] arrive."""

    token: Node
    sent: Node
    received: Node
    waits: tuple[Node, Node]


def route(gm: GraphModule, e: Exchange, like: Node) -> Routed:
    """Which group computes each slot."""
    chosen = call(gm.graph, aten.to.dtype, (e.experts.experts, torch.int64), like=like)
    number = token_numbers(gm, chosen, like)
    return Routed(chosen, chosen_groups(gm, e.residency, chosen, number, like), number)


def token_numbers(gm: GraphModule, chosen: Node, like: Node) -> Node:
    """[T, K] -> i64[T]: 1, 2, .. T."""
    first = call(gm.graph, aten.select.int, (chosen, 1, 0), like=like)
    return call(
        gm.graph, aten.cumsum.default, (call(gm.graph, aten.ones_like.default, (first,), like=like), 0), like=like
    )


def chosen_groups(gm: GraphModule, residency: Residency, chosen: Node, number: Node, like: Node) -> Node:
    """i64[T, K]: the group that serves each slot, -1 for a dropped one (expert E). The parts of copied experts are the
    weight "token_shares_<layer>": they can be set anew while serving."""
    most = residency.most_copies
    padded = [[*copies, *[copies[-1]] * (most - len(copies))] for copies in residency.copies]
    padded.append([(-1, 1.0)] * most)
    groups = weight_node(gm, f"{like.name}_copy_group", literal(torch.tensor([[g for g, _ in c] for c in padded])))
    flat = call(gm.graph, aten.reshape.default, (groups, [-1]), like=like)
    if most == 1:
        return call(gm.graph, aten.take.default, (flat, chosen), like=like)
    shares = torch.zeros(len(padded), most, dtype=torch.float64)
    for expert, copies in enumerate(residency.copies):
        shares[expert, : len(copies)] = torch.tensor([part for _, part in copies], dtype=torch.float64)
    name = f"token_shares_{like.meta.get('layer')}"
    ends = shares.cumsum(1).float()[:, :-1].contiguous()  # the last copy takes what rounding leaves
    table = weight_node(gm, name, named(literal(ends), name))
    turn = call(gm.graph, aten.mul.Tensor, (number, TURN), like=like)
    turn = call(gm.graph, aten.remainder.Scalar, (turn, 1.0), like=like)  # [T]
    turn = call(gm.graph, aten.unsqueeze.default, (turn, -1), like=like)
    at = call(gm.graph, aten.mul.Tensor, (chosen, most), like=like)
    for copy in range(most - 1):
        end = call(gm.graph, aten.select.int, (table, 1, copy), like=like)
        passed = call(
            gm.graph, aten.ge.Tensor, (turn, call(gm.graph, aten.take.default, (end, chosen), like=like)), like=like
        )
        at = call(gm.graph, aten.add.Tensor, (at, passed), like=like)
    return call(gm.graph, aten.take.default, (flat, at), like=like)


def dispatch(gm: GraphModule, e: Exchange, r: Routed, chunk: int, like: Node) -> Sent:
    """Sends each token's row, and its experts and weights there, to every rank that serves one of its slots."""
    g, a = gm.graph, e.experts
    serves = weight_node(gm, f"{like.name}_group_of_rank", literal(torch.tensor(e.residency.group_of_rank)))  # [R]
    column = call(g, aten.reshape.default, (serves, [-1, 1, 1]), like=like)
    slots = call(g, aten.eq.Tensor, (call(g, aten.unsqueeze.default, (r.groups, 0), like=like), column), like=like)
    reach = call(g, aten.any.dim, (slots, -1), like=like)  # bool[R, T]
    if e.parts > 1:
        turn = call(g, aten.remainder.Scalar, (r.number, e.parts), like=like)
        mine = call(g, aten.eq.Scalar, (turn, e.part), like=like)
        reach = call(g, aten.logical_and.default, (reach, mine), like=like)
    counts = call(g, aten.sum.dim_IntList, (reach, [1]), like=like)  # i64[R]
    ones = [1] * len(e.group.ranks)
    sizes = issue(gm, c10d.all_to_all_single.default, (counts, ones, ones), e.group, like)
    open_sent, open_received = _open_sizes(gm, a.x, chunk)
    rows = _found(gm, reach, open_sent, like)  # i64[S, 2]: rank, token; rank by rank
    to, token = (call(g, aten.select.int, (rows, 1, i), like=like) for i in (0, 1))
    x = call(g, aten.index_select.default, (a.x, 0, token), like=like)
    routes = _routes(gm, e, r, call(g, aten.index_select.default, (serves, 0, to), like=like), token, like)
    sent = _sizes(gm, counts, open_sent, e, like)
    received = _sizes(gm, wait(gm, sizes, like), open_received, e, like)
    flying = [issue(gm, c10d.all_to_all_single.default, (t, received, sent), e.group, like) for t in (x, routes)]
    there, routed = (wait(gm, f, like) for f in flying)
    return Sent(token, sent, received, (there, routed))


def _routes(gm: GraphModule, e: Exchange, r: Routed, to_group: Node, token: Node, like: Node) -> Node:
    """f32[S, 2K]: the weights of a row's slots, and the experts that its receiver is to use (E for the others')."""
    g = gm.graph
    chosen, groups, weights = (
        call(g, aten.index_select.default, (v, 0, token), like=like) for v in (r.chosen, r.groups, e.experts.weights)
    )
    there = call(g, aten.eq.Tensor, (groups, call(g, aten.unsqueeze.default, (to_group, -1), like=like)), like=like)
    elsewhere = call(g, aten.logical_not.default, (there,), like=like)
    chosen = call(g, aten.masked_fill.Scalar, (chosen, elsewhere, e.num_experts), like=like)
    parts = [call(g, aten.to.dtype, (v, torch.float32), like=like) for v in (weights, chosen)]
    return call(g, aten.cat.default, (parts, -1), like=like)


def compute(gm: GraphModule, e: Exchange, sent: Sent, like: Node) -> Node:
    """The experts over the rows that arrived, and the way back: -> wait [S, H]."""
    g, a = gm.graph, e.experts
    rows, routes = sent.waits
    if e.residency.group_of_rank[e.rank] < 0:  # no columns here: nobody sends, and there is nothing to compute
        y = rows
    else:
        held = e.residency.held(e.residency.group_of_rank[e.rank])
        weights = call(g, aten.slice.Tensor, (routes, 1, 0, a.top_k), like=like)
        weights = call(g, aten.to.dtype, (weights, a.weights.meta["val"].dtype), like=like)
        chosen = call(g, aten.slice.Tensor, (routes, 1, a.top_k, 2 * a.top_k), like=like)
        chosen = local_numbers(gm, call(g, aten.to.dtype, (chosen, torch.int64), like=like), held, e.num_experts, like)
        args = replace(a, x=rows, weights=weights, experts=chosen).args
        y = call(g, moec.experts.default, args, like=like)
    back = issue(gm, c10d.all_to_all_single.default, (y, sent.sent, sent.received), e.group, like)
    return wait(gm, back, like)


def collect(gm: GraphModule, e: Exchange, parts: Sequence[tuple[Sent, Node]], like: Node) -> Node:
    """The sum of what came back for each token [T, H]; zero for tokens that another rank of the lane sends."""
    g, x = gm.graph, e.experts.x
    wide = torch.float64 if e.experts.dtype == torch.float64 else torch.float32
    total = call(g, aten.zeros_like.default, (x,), {"dtype": wide}, like=like)
    for sent, back in parts:
        rows = call(g, aten.to.dtype, (back, wide), like=like)
        total = call(g, aten.index_add.default, (total, 0, sent.token, rows), like=like)
    return call(g, aten.to.dtype, (total, e.experts.dtype), like=like)


def local_numbers(gm: GraphModule, chosen: Node, held: Sequence[int], num_experts: int, like: Node) -> Node:
    """chosen i64, 0 to E -> numbers among the held experts; len(held) for one that is not held."""
    table = torch.full((num_experts + 1,), len(held), dtype=torch.int64)
    table[list(held)] = torch.arange(len(held))
    node = weight_node(gm, f"{like.name}_local_expert", literal(table))
    return call(gm.graph, aten.take.default, (node, chosen), like=like)


def _found(gm: GraphModule, reach: Node, size: torch.SymInt, like: Node) -> Node:
    """i64[S, 2]: where a mask [R, T] is true, in order; how often, data decide."""
    node = gm.graph.call_function(aten.nonzero.default, (reach,))
    with _mode(reach):
        node.meta["val"] = torch.empty(size, 2, dtype=torch.int64, device=like.meta["val"].device)
    node.meta["layer"] = like.meta.get("layer")
    return node


_OPEN: weakref.WeakKeyDictionary[FakeTensorMode, list[torch.SymInt]] = weakref.WeakKeyDictionary()


def _open_sizes(gm: GraphModule, node: Node, chunk: int) -> tuple[torch.SymInt, torch.SymInt]:
    """Rows sent and received by a chunk: sizes that data decide, S0, S1, .. in the graph's text and program.

    Every exchange uses the same names, each with numbers of its own: the shape functions of a layer then serve all.
    """
    mode = _mode(node)
    if mode.shape_env is None:
        raise PassError(f"{node.name}: an exchange needs a graph with symbolic sizes; capture it with one")
    sizes = _OPEN.setdefault(mode, [])
    while len(sizes) < 2 * chunk + 2:
        sizes.append(mode.shape_env.create_unbacked_symint())
        torch._check(sizes[-1] >= 0)
    letters = {str(size.node.expr): f"S{i}" for i, size in enumerate(sizes)}
    gm.meta["symbols"] = symbol_letters(gm) | letters
    return sizes[2 * chunk], sizes[2 * chunk + 1]


def _mode(node: Node) -> FakeTensorMode:
    val = node.meta["val"]
    if not isinstance(val, FakeTensor):
        raise PassError(f"{node.name}: an exchange needs fake values, found {type(val).__name__}")
    return val.fake_mode


def _sizes(gm: GraphModule, counts: Node, total: Any, e: Exchange, like: Node) -> Node:
    """The rows for each rank as a list on the host. Its fake value says only what they sum to."""
    node = gm.graph.call_function(split_sizes, (counts,))
    node.meta |= {"val": [total] + [0] * (len(e.group.ranks) - 1), "layer": like.meta.get("layer")}
    return node


def is_sizes(node: object) -> bool:
    """Whether a node is split_sizes(counts)."""
    return isinstance(node, Node) and node.target is split_sizes


def insert_exchange(gm: GraphModule, chunks: Sequence[Exchange], before: Node, like: Node) -> Node:
    """A whole exchange in front of `before`: all chunks sent, each computed and sent back, the sum of all.

    meta["exchange"] of every node is the result's name, so that overlap-collectives can write it anew in more chunks.
    """
    with gm.graph.inserting_before(before):
        routed = route(gm, chunks[0], like)
        sent = [dispatch(gm, c, routed, i, like) for i, c in enumerate(chunks)]
        parts = [(s, compute(gm, c, s, like)) for s, c in zip(sent, chunks, strict=True)]
        total = collect(gm, chunks[0], parts, like)
    node = routed.chosen
    while node is not before:
        node.meta["exchange"] = total.name
        node = node.next
    total.meta["exchanged_by"] = chunks[0]
    return total
