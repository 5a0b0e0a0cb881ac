"""ONNX operators that gather, scatter and choose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moec.compiler.capture.onnx import host
from moec.compiler.errors import UnsupportedModel

REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def gather(data: Any, indices: Any, *, axis: int = 0) -> Any:
    """Gather: on the host where data and indices are there; rows of a parameter are taken as an embedding."""
    if not isinstance(data, Tensor):
        if not isinstance(indices, Tensor):
            return [data[i] for i in indices] if isinstance(indices, list) else data[indices]
        data = host.tensor(data)
    axis = axis % data.dim()
    if host.is_size(indices):
        return data.select(axis, indices)
    index = host.tensor(indices).long()
    if axis == 0 and data.dim() == 2 and isinstance(data, nn.Parameter) and index.dim():
        return F.embedding(index, data)
    return data[(slice(None),) * axis + (index,)]


def gather_elements(data: Any, indices: Any, *, axis: int = 0) -> Tensor:
    """GatherElements: indices of the result's shape, along one axis."""
    return torch.gather(host.tensor(data), axis, host.tensor(indices).long())


def gather_nd(data: Any, indices: Any, *, batch_dims: int = 0) -> Tensor:
    """GatherND: the last axis of indices names a place. Raises: UnsupportedModel: batch_dims."""
    if batch_dims:
        raise UnsupportedModel(f"batch_dims is {batch_dims}; 0 is read")
    return host.tensor(data)[tuple(host.tensor(indices).long().unbind(-1))]


def scatter_elements(data: Any, indices: Any, updates: Any, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """ScatterElements. reduction: "none", "add", or one of REDUCTIONS."""
    data, index = host.tensor(data), host.tensor(indices).long()
    updates = host.tensor(updates, data)
    host.same_type(data, updates)
    if reduction == "none":
        return torch.scatter(data, axis, index, updates)
    if reduction == "add":
        return torch.scatter_add(data, axis, index, updates)
    return torch.scatter_reduce(data, axis, index, updates, REDUCTIONS[reduction])


def scatter_nd(data: Any, indices: Any, updates: Any, *, reduction: str = "none") -> Any:
    """ScatterND; into a list of the host it stays there. Raises: UnsupportedModel: another reduction than add."""
    if reduction == "none" and not any(isinstance(v, Tensor) for v in (data, indices, updates)):
        places = indices if isinstance(indices, list) else [indices]
        changed = list(data)
        for place, value in zip(places, updates if isinstance(updates, list) else [updates], strict=True):
            changed[place] = value
        return changed
    if reduction not in ("none", "add"):
        raise UnsupportedModel(f"scatters by {reduction}; none and add are read")
    data = host.tensor(data)
    updates = host.tensor(updates, data)
    host.same_type(data, updates)
    index = tuple(host.tensor(indices).long().unbind(-1))
    return data.index_put(index, updates, accumulate=reduction == "add")


def nonzero(data: Any) -> Tensor:
    """[axes, found]: how many there are follows from the values."""
    return torch.nonzero(host.tensor(data)).t()


def one_hot(indices: Any, depth: Any, values: Any, *, axis: int = -1) -> Tensor:
    """values: off and on. An index from -depth to -1 counts from the end; any other outside gives no entry."""
    count, index = host.number(depth), host.tensor(indices).long()
    index, places = index.unsqueeze(-1), torch.arange(count)
    hot = (index == places) | (index == places - count)
    if axis not in (-1, index.dim() - 1):
        hot = hot.movedim(-1, axis)
    if isinstance(values, list) and values == [0, 1]:
        return hot.long()
    pair = host.tensor(values)
    return torch.where(hot, pair[1], pair[0])


def topk(x: Tensor, k: Any, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """TopK: values, indices i64."""
    values, indices = torch.topk(x, host.number(k), axis, bool(largest), bool(sorted))
    return values, indices


def argmax(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """ArgMax. Raises: UnsupportedModel: the last of equal values is asked for."""
    if select_last_index:
        raise UnsupportedModel("the last of equal values is asked for; the first is read")
    return torch.argmax(x, axis, bool(keepdims))


def argmin(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """ArgMin. Raises: UnsupportedModel: the last of equal values is asked for."""
    if select_last_index:
        raise UnsupportedModel("the last of equal values is asked for; the first is read")
    return torch.argmin(x, axis, bool(keepdims))


def trilu(x: Tensor, k: Any = 0, *, upper: int = 1) -> Tensor:
    """Trilu: the triangle above (below) diagonal k with it, zeros elsewhere."""
    return (torch.triu if upper else torch.tril)(x, host.number(k))


def cumsum(x: Any, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """CumSum. exclusive: without the element itself; reverse: from the end."""
    x, along = host.tensor(x), host.number(axis)
    total = torch.cumsum(x.flip(along) if reverse else x, along).to(x.dtype)
    total = total.flip(along) if reverse else total
    return total - x if exclusive else total
