"""ATen operators that move, cut, join, repeat and make tensors, in standard ONNX operators; see operators.py."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from moec.compiler.export.onnx.builder import LAST
from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.onnx.values import Values, axis, dtype_of, rank_of

aten = torch.ops.aten


def _same(v: Values, node: Node, x: Node, *_: Any, **__: Any) -> ir.Value:
    return v.tensor(x)


def _reshape(v: Values, node: Node, x: Node, sizes: Sequence[Any]) -> ir.Value:
    """A single symbolic size follows from the others."""
    symbolic = [s for s in sizes if isinstance(s, Node)]
    if len(symbolic) == 1 and -1 not in sizes:
        sizes = [-1 if isinstance(s, Node) else s for s in sizes]
    return v.b.op("Reshape", v.tensor(x), v.sizes(sizes))


def _view_as(v: Values, node: Node, x: Node, other: Node) -> ir.Value:
    return v.b.op("Reshape", v.tensor(x), v.b.op("Shape", v.tensor(other)))


def _flatten(v: Values, node: Node, x: Node, start: int = 0, end: int = -1) -> ir.Value:
    first, last = axis(x, start), axis(x, end)
    value, rank = v.tensor(x), rank_of(x)
    after = [v.b.size(value, d) for d in range(last + 1, rank)]
    return v.b.reshape(value, *([0] * first), -1, *after)


def _unflatten(v: Values, node: Node, x: Node, dim: int, sizes: Sequence[Any]) -> ir.Value:
    at, value = axis(x, dim), v.tensor(x)
    inner = [v.bound(s) for s in sizes]
    return v.b.reshape(value, *([0] * at), *inner, *(v.b.size(value, d) for d in range(at + 1, rank_of(x))))


def _unsqueeze(v: Values, node: Node, x: Node, dim: int) -> ir.Value:
    return v.b.unsqueeze(v.tensor(x), axis(node, dim))


def _squeeze(v: Values, node: Node, x: Node, dim: Any = None) -> ir.Value:
    """Only sizes that are 1, as torch does. dim: None: all of them."""
    given = range(rank_of(x)) if dim is None else [dim] if isinstance(dim, int) else dim
    dims = [axis(x, d) for d in given]
    ones = [d for d in dims if x.meta["val"].shape[d] == 1]
    return v.b.op("Squeeze", v.tensor(x), v.b.ints(*ones)) if ones else v.tensor(x)


def _transpose(v: Values, node: Node, x: Node, a: int, c: int) -> ir.Value:
    perm = list(range(rank_of(x)))
    a, c = axis(x, a), axis(x, c)
    perm[a], perm[c] = perm[c], perm[a]
    return v.b.transpose(v.tensor(x), *perm)


def _matrix_transpose(v: Values, node: Node, x: Node) -> ir.Value:
    return v.b.transpose(v.tensor(x), *reversed(range(rank_of(x))))


def _permute(v: Values, node: Node, x: Node, dims: Sequence[int]) -> ir.Value:
    return v.b.transpose(v.tensor(x), *(axis(x, d) for d in dims))


def _expand(v: Values, node: Node, x: Node, sizes: Sequence[Any], *, implicit: bool = False) -> ir.Value:
    """-1 keeps a size; Expand keeps it for 1."""
    return v.b.op("Expand", v.tensor(x), v.sizes([1 if s == -1 else s for s in sizes]))


def _expand_as(v: Values, node: Node, x: Node, other: Node) -> ir.Value:
    return v.b.op("Expand", v.tensor(x), v.b.op("Shape", v.tensor(other)))


def _repeat(v: Values, node: Node, x: Node, repeats: Sequence[Any]) -> ir.Value:
    value = v.tensor(x)
    missing = len(repeats) - rank_of(x)
    if missing:
        value = v.b.unsqueeze(value, *range(missing))
    return v.b.op("Tile", value, v.sizes(repeats))


def _repeat_interleave(v: Values, node: Node, x: Node, repeats: int, dim: int | None = None, **_: Any) -> ir.Value:
    if dim is None:
        raise ExportError(f"{node.name}: repeat_interleave without a dimension has no ONNX form here")
    at, value = axis(x, dim), v.tensor(x)
    sizes = [v.b.size(value, d) for d in range(rank_of(x))]
    wide = v.b.op("Expand", v.b.unsqueeze(value, at + 1), v.b.shape(*sizes[: at + 1], repeats, *sizes[at + 1 :]))
    return v.b.reshape(wide, *([0] * at), -1, *sizes[at + 1 :])


def _cat(v: Values, node: Node, parts: Sequence[Node], dim: int = 0) -> ir.Value:
    return v.b.op("Concat", *(v.tensor(p, dtype_of(node)) for p in parts), axis=axis(node, dim))


def _stack(v: Values, node: Node, parts: Sequence[Node], dim: int = 0) -> ir.Value:
    at = axis(node, dim)
    return v.b.op("Concat", *(v.b.unsqueeze(v.tensor(p, dtype_of(node)), at) for p in parts), axis=at)


def _slice(v: Values, node: Node, x: Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> ir.Value:
    first, last = 0 if start is None else v.bound(start), LAST if end is None else v.bound(end)
    if first == 0 and last == LAST and step == 1:
        return v.tensor(x)
    return v.b.slice(v.tensor(x), axis(x, dim), first, last, step)


def _narrow(v: Values, node: Node, x: Node, dim: int, start: Any, length: Any) -> ir.Value:
    first, size = v.bound(start), v.bound(length)
    if isinstance(first, int) and isinstance(size, int):
        return v.b.slice(v.tensor(x), axis(x, dim), first, first + size)
    return v.b.slice(v.tensor(x), axis(x, dim), first, v.b.op("Add", v.sizes([start]), v.sizes([length])))


def _select(v: Values, node: Node, x: Node, dim: int, index: Any) -> ir.Value:
    return v.b.op("Gather", v.tensor(x), v.scalar_size(index), axis=axis(x, dim))


def _split(v: Values, node: Node, x: Node, size: Any, dim: int = 0) -> Sequence[ir.Value]:
    """By the sizes that the results have."""
    at = axis(x, dim)
    widths = [t.shape[at] for t in node.meta["val"]]
    if len(widths) == 1:
        return (v.tensor(x),)
    if not all(isinstance(w, int) for w in widths):
        raise ExportError(f"{node.name}: splits a symbolic size, which has no ONNX form here")
    return v.b.many("Split", len(widths), v.tensor(x), v.b.ints(*widths), axis=at)


def _unbind(v: Values, node: Node, x: Node, dim: int = 0) -> list[ir.Value]:
    return [
        v.b.op("Gather", v.tensor(x), v.b.number(i, torch.int64), axis=axis(x, dim))
        for i in range(len(node.meta["val"]))
    ]


def _index_select(v: Values, node: Node, x: Node, dim: int, index: Node) -> ir.Value:
    return v.b.op("Gather", v.tensor(x), v.tensor(index), axis=axis(x, dim))


def _index(v: Values, node: Node, x: Node, indices: Sequence[Node | None]) -> ir.Value:
    """Integers in one place; a mask or several indices have other meanings."""
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(given) != 1 or dtype_of(given[0][1]) is torch.bool:
        raise ExportError(f"{node.name}: indexing with {len(given)} tensors or a mask has no ONNX form here")
    dim, index = given[0]
    return v.b.op("Gather", v.tensor(x), v.tensor(index), axis=dim)


def _gather(v: Values, node: Node, x: Node, dim: int, index: Node, **_: Any) -> ir.Value:
    return v.b.op("GatherElements", v.tensor(x), v.tensor(index), axis=axis(x, dim))


def _embedding(v: Values, node: Node, weight: Node, index: Node, *_: Any) -> ir.Value:
    return v.b.op("Gather", v.tensor(weight), v.tensor(index))


def _scatter(reduction: str) -> Callable[..., ir.Value]:
    def emit(v: Values, node: Node, x: Node, dim: int, index: Node, source: Any) -> ir.Value:
        values = v.tensor(source, dtype_of(node))
        if not isinstance(source, Node):
            values = v.b.op("Expand", values, v.b.op("Shape", v.tensor(index)))
        return v.b.op("ScatterElements", v.tensor(x), v.tensor(index), values, axis=axis(x, dim), reduction=reduction)

    return emit


def _arange(v: Values, node: Node, *bounds: Any, **_: Any) -> ir.Value:
    start, end, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    dtype = dtype_of(node)
    if not all(isinstance(n, (int, Node)) for n in (start, end, step)):
        raise ExportError(f"{node.name}: a range of fractions has no ONNX form here")
    values = v.b.op("Range", *(v.scalar_size(n) for n in (start, end, step)))
    return values if dtype is torch.int64 else v.b.cast(values, dtype)


def _full(v: Values, node: Node, sizes: Sequence[Any], value: Any, **_: Any) -> ir.Value:
    number = v.tensor(value, dtype_of(node))
    return v.b.op("Expand", number, v.sizes(sizes)) if len(sizes) else number


def _filled(value: float) -> Callable[..., ir.Value]:
    return lambda v, node, sizes, **_: _full(v, node, sizes, value)


def _new_filled(value: float) -> Callable[..., ir.Value]:
    return lambda v, node, x, sizes, **_: _full(v, node, sizes, value)


def _like(v: Values, node: Node, x: Node, value: Any, **_: Any) -> ir.Value:
    return v.b.op("Expand", v.tensor(value, dtype_of(node)), v.b.op("Shape", v.tensor(x)))


def _filled_like(value: float) -> Callable[..., ir.Value]:
    return lambda v, node, x, **_: _like(v, node, x, value)


def _pad(v: Values, node: Node, x: Node, pads: Sequence[int], *rest: Any) -> ir.Value:
    """pads: last dimension first, before and after, as torch has them; constant padding."""
    value = rest[-1] if rest and not isinstance(rest[-1], str) else 0
    rank = rank_of(x)
    before, after = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    if not all(isinstance(n, int) for n in (*before, *after)):
        raise ExportError(f"{node.name}: pads by a symbolic size, which has no ONNX form here")
    return v.b.op("Pad", v.tensor(x), v.b.ints(*before, *after), v.b.number(value or 0, dtype_of(node)))


def _getitem(v: Values, node: Node, x: Node, index: int) -> Any:
    return v.of[x][index]


SHAPES: dict[Any, Callable[..., Any]] = {
    operator.getitem: _getitem,
    aten.sym_size.int: lambda v, node, x, dim: v.b.size(v.tensor(x), axis(x, dim)),
    aten.alias.default: _same, aten.clone.default: _same, aten.contiguous.default: _same, aten.detach.default: _same,
    aten.lift_fresh_copy.default: _same, aten.dropout.default: _same,
    aten.view.default: _reshape, aten._unsafe_view.default: _reshape, aten.reshape.default: _reshape,
    aten.view_as.default: _view_as, aten.flatten.using_ints: _flatten, aten.unflatten.int: _unflatten,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze, aten.squeeze.dim: _squeeze, aten.squeeze.dims: _squeeze,
    aten.transpose.int: _transpose, aten.t.default: _matrix_transpose, aten.permute.default: _permute,
    aten.expand.default: _expand, aten.expand_as.default: _expand_as, aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.cat.default: _cat, aten.concat.default: _cat, aten.stack.default: _stack,
    aten.slice.Tensor: _slice, aten.narrow.default: _narrow, aten.select.int: _select,
    aten.split.Tensor: _split, aten.split_with_sizes.default: _split, aten.chunk.default: _split,
    aten.unbind.int: _unbind,
    aten.index_select.default: _index_select, aten.index.Tensor: _index, aten.gather.default: _gather,
    aten.embedding.default: _embedding,
    aten.scatter.src: _scatter("none"), aten.scatter.value: _scatter("none"), aten.scatter_add.default: _scatter("add"),
    aten.arange.default: _arange, aten.arange.start: _arange, aten.arange.start_step: _arange,
    aten.full.default: _full, aten.zeros.default: _filled(0), aten.ones.default: _filled(1),
    aten.scalar_tensor.default: lambda v, node, value, **_: v.tensor(value, dtype_of(node)),
    aten.new_zeros.default: _new_filled(0), aten.new_ones.default: _new_filled(1),
    aten.new_full.default: lambda v, node, x, sizes, value, **_: _full(v, node, sizes, value),
    aten.zeros_like.default: _filled_like(0), aten.ones_like.default: _filled_like(1), aten.full_like.default: _like,
    aten.constant_pad_nd.default: _pad, aten.pad.default: _pad,
}  # fmt: skip
