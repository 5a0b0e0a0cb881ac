"""Moves the layout of weights out of the graph and into their recipes, and brings products into one orientation.

Before:  t = aten.transpose(w, 0, 1); y = aten.addmm(b, x, t); z = aten.matmul(y, v)        w [N, K], v [N, M]
After:   y = aten.linear(x, w, b); z = aten.linear(y, v')                                   v' = transpose(v, 0, 1)
Leaves alone: batched products (3-d weights), addmm with factors, weights that the graph computes.
Needs:   meta["weights"].  Gives: products with a weight are aten.linear with w [out, in]; nothing reshapes a weight.
Source:  kernels pack weights once, at compile time: what the graph does to a weight it would do at every step.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import argument, call, is_call, remove_dead, replace
from moec.passes.ir.weights import Weight, reshape, slice_, transpose, weight_node, weight_of

aten = torch.ops.aten
RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
)
SPLITS = (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default, aten.unbind.int)
TURNS = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)
PRODUCTS = (aten.mm.default, aten.matmul.default, aten.addmm.default)


class LayoutWeights:
    """Shape operations on weights become recipes; products become aten.linear."""

    name = "layout-weights"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        entries: list[Match | NoMatch] = []
        for node in list(gm.graph.nodes):
            name, layer = node.name, layer_of(node)
            recipe = _recipe(gm, node)
            if recipe is not None:
                with gm.graph.inserting_before(node):
                    replace(node, weight_node(gm, name, recipe))
                entries.append(Match(name, layer, str(recipe)))
            elif is_call(node, *PRODUCTS):
                reason = _to_linear(gm, node)
                entries.append(NoMatch(reason, name, layer) if reason else Match(name, layer, "linear"))
        changed = any(isinstance(e, Match) for e in entries)
        if changed:
            remove_dead(gm)
        return PassResult(gm, changed, Ledger.of(entries))


def _recipe(gm: GraphModule, node: Node) -> Weight | None:
    """The weight that a shape operation on a weight gives; None: it is something else."""
    if is_call(node, operator.getitem) and is_call(node.args[0], *SPLITS):
        return _part(gm, node.args[0], node)
    weight = weight_of(gm, node.args[0]) if node.op == "call_function" and node.args else None
    if weight is None:
        return None
    rank = len(weight.shape)
    if is_call(node, *RESHAPES):
        return reshape(weight, tuple(node.meta["val"].shape))
    if is_call(node, *TURNS):
        return _turned(weight, _order(node, rank))
    if is_call(node, aten.slice.Tensor):
        dim, start, stop, step = (argument(node, i + 1, k, d) for i, (k, d) in enumerate(_SLICE))
        bounds = slice(start, stop, step).indices(weight.shape[dim])
        return slice_(weight, dim % rank, *bounds)
    if is_call(node, aten.select.int):
        dim, index = node.args[1] % rank, node.args[2] % weight.shape[node.args[1]]
        return reshape(slice_(weight, dim, index, index + 1), tuple(node.meta["val"].shape))
    return None


_SLICE = (("dim", 0), ("start", None), ("end", None), ("step", 1))


def _part(gm: GraphModule, split: Node, item: Node) -> Weight | None:
    """Part i of a split weight."""
    weight = weight_of(gm, split.args[0])
    if weight is None:
        return None
    place = 1 if split.target is aten.unbind.int else 2
    dim = argument(split, place, "dim", 0) % len(weight.shape)
    shapes = [tuple(v.shape) for v in split.meta["val"]]
    index = item.args[1]
    lengths = [1 if split.target is aten.unbind.int else s[dim] for s in shapes]
    start = sum(lengths[:index])
    return reshape(slice_(weight, dim, start, start + lengths[index]), shapes[index])


def _order(node: Any, rank: int) -> list[int]:
    """The permutation that a transposing call applies to the axes."""
    if is_call(node, aten.permute.default):
        return [d % rank for d in node.args[1]]
    order = list(range(rank))
    if is_call(node, aten.transpose.int):
        a, b = (d % rank for d in node.args[1:3])
        order[a], order[b] = order[b], order[a]
        return order
    return order[::-1]


def _turned(weight: Weight, order: list[int]) -> Weight:
    """The permutation as swaps; swapping twice gives the stored tensor back."""
    now = list(range(len(order)))
    for place, axis in enumerate(order):
        other = now.index(axis)
        if other == place:
            continue
        now[place], now[other] = now[other], now[place]
        undoes = weight.op == "transpose" and weight.args == (place, other)
        weight = weight.inputs[0] if undoes else transpose(weight, place, other)
    return weight


def _to_linear(gm: GraphModule, node: Node) -> str | None:
    """Writes a product with a stored matrix as aten.linear, or says why not."""
    bias, x, w = node.args if is_call(node, aten.addmm.default) else (None, *node.args)
    weight = weight_of(gm, w)
    if weight is None:
        return "its right operand is no stored weight"
    if len(weight.shape) != 2:
        return f"its weight has {len(weight.shape)} axes"
    if any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
        return "it scales its operands"
    if bias is not None and tuple(bias.meta["val"].shape) != (weight.shape[1],):
        return "its bias is not one number per output"
    with gm.graph.inserting_before(node):
        turned = weight_node(gm, f"{w.target}_rows", _turned(weight, [1, 0]))
        args = (x, turned) if bias is None else (x, turned, bias)
        replace(node, call(gm.graph, aten.linear.default, args, like=node))
    return None
