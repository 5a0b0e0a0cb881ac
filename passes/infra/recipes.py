"""Reads a constant piece of graph (weights through views, slices, stacks, casts) as a lazy Weight."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from moec.passes.ir.weights import Weight, cast, concat, reshape, slice_, stack, transpose

aten = torch.ops.aten


def recipe_of(node: Node, weights: Mapping[str, Weight]) -> Weight | None:
    """The Weight that a node's value is; None where it is computed by anything else than rearranging weights."""
    if node.op == "get_attr":
        return weights.get(str(node.target))
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return _part(node, weights)
    rule = RULES.get(node.target)
    if rule is None:
        return None
    operands = []
    for producer in node.all_input_nodes:
        inner = recipe_of(producer, weights)
        if inner is None:
            return None
        operands.append(inner)
    return rule(node, operands)


def _part(node: Node, weights: Mapping[str, Weight]) -> Weight | None:
    """getitem of chunk, split or unbind."""
    maker, idx = node.args
    assert isinstance(maker, Node)
    if maker.target not in SPLITS:
        return None
    whole = recipe_of(maker.all_input_nodes[0], weights)
    if whole is None:
        return None
    if maker.target is aten.unbind.int:
        return _select(whole, _dim(maker, 1, 0, whole), int(idx))  # type: ignore[arg-type]
    dim = _dim(maker, 2, 0, whole)
    sizes = [v.shape[dim] for v in maker.meta["val"]]
    start = sum(sizes[: int(idx)])  # type: ignore[arg-type]
    return slice_(whole, dim, start, start + sizes[int(idx)])  # type: ignore[arg-type]


SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.unbind.int)


def _dim(node: Node, position: int, default: int, w: Weight) -> int:
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    return int(dim) % len(w.shape)  # type: ignore[arg-type]


def _select(w: Weight, dim: int, idx: int) -> Weight:
    idx %= w.shape[dim]
    part = slice_(w, dim, idx, idx + 1)
    return reshape(part, tuple(s for i, s in enumerate(w.shape) if i != dim))


def _slice(node: Node, w: Weight) -> Weight:
    dim = _dim(node, 1, 0, w)
    given = [*node.args[2:], None, None, None][:3]
    start, stop, step = slice(*given).indices(w.shape[dim])  # type: ignore[arg-type]
    return w if (start, stop, step) == (0, w.shape[dim], 1) else slice_(w, dim, start, stop, step)


def _permute(w: Weight, order: list[int]) -> Weight:
    """As a chain of swaps."""
    order, now = [d % len(w.shape) for d in order], list(range(len(w.shape)))
    for i, want in enumerate(order):
        j = now.index(want)
        if i != j:
            w, now[i], now[j] = transpose(w, i, j), now[j], now[i]
    return w


def _own_shape(node: Node, w: Weight) -> Weight:
    shape = tuple(int(s) for s in node.meta["val"].shape)
    return w if shape == w.shape else reshape(w, shape)


def _stack(node: Node, parts: list[Weight]) -> Weight | None:
    ordered = _listed(node, parts)
    return stack(ordered) if _dim(node, 1, 0, ordered[0]) == 0 else None


def _listed(node: Node, parts: list[Weight]) -> list[Weight]:
    """The operands of stack and cat in order (all_input_nodes names each once)."""
    known = dict(zip(node.all_input_nodes, parts, strict=True))
    return [known[n] for n in node.args[0]]  # type: ignore[union-attr, index, misc]


Rule = Callable[[Node, list[Weight]], Weight | None]
RULES: dict[Any, Rule] = {
    aten.transpose.int: lambda n, w: transpose(w[0], _dim(n, 1, 0, w[0]), _dim(n, 2, 0, w[0])),
    aten.t.default: lambda n, w: transpose(w[0], 0, 1) if len(w[0].shape) == 2 else w[0],
    aten.numpy_T.default: lambda n, w: _permute(w[0], list(range(len(w[0].shape)))[::-1]),
    aten.permute.default: lambda n, w: _permute(w[0], list(n.args[1])),  # type: ignore[arg-type]
    aten.slice.Tensor: lambda n, w: _slice(n, w[0]),
    aten.select.int: lambda n, w: _select(w[0], _dim(n, 1, 0, w[0]), int(n.args[2])),  # type: ignore[arg-type]
    aten.to.dtype: lambda n, w: cast(w[0], n.meta["val"].dtype),
    aten._to_copy.default: lambda n, w: cast(w[0], n.meta["val"].dtype),
    aten.stack.default: _stack,
    aten.cat.default: lambda n, w: concat(_listed(n, w), _dim(n, 1, 0, w[0])),
    **{
        op: lambda n, w: _own_shape(n, w[0])
        for op in (
            aten.view.default,
            aten.reshape.default,
            aten.unsqueeze.default,
            aten.squeeze.dim,
            aten.squeeze.default,
            aten.flatten.using_ints,
            aten.contiguous.default,
            aten.clone.default,
            aten.detach.default,
            aten.alias.default,
        )
    },
}
