"""ONNX operators that move elements without computing with them, on tensors and on lists of sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.compiler.capture.onnx import host
from moec.compiler.errors import UnsupportedModel


def _vector(data: Any) -> Any:
    """A value of the host as a list; a tensor as it is."""
    return data if isinstance(data, Tensor | list) else [data]


def shape(data: Any, *, start: int = 0, end: int | None = None) -> list[Any]:
    """Shape: a list on the host; sizes of a trace stay symbolic."""
    return list(data.shape)[start:end] if isinstance(data, Tensor) else [len(data)][start:end]


def size(data: Any) -> Any:
    """Size: the number of elements, on the host."""
    return data.numel() if isinstance(data, Tensor) else len(_vector(data))


def reshape(data: Any, wanted: Any, *, allowzero: int = 0) -> Any:
    """Reshape: 0 keeps a size (unless allowzero), -1 follows from the others."""
    sizes = host.ints(wanted)
    if not isinstance(data, Tensor):
        if len(sizes) == 1:
            return _vector(data)
        if not sizes:
            return host.number(data)
        data = host.tensor(data)
    if not allowzero:
        sizes = [data.shape[i] if isinstance(s, int) and s == 0 else s for i, s in enumerate(sizes)]
    return data.reshape(sizes)


def flatten(data: Tensor, *, axis: int = 1) -> Tensor:
    """To two axes."""
    if axis == data.dim() - 1 or axis == -1:
        return data.flatten(0, -2) if data.dim() > 1 else data[None]
    if axis % max(1, data.dim()) == 0:
        return data.reshape(1, -1)
    return data.flatten(axis).flatten(0, axis - 1 if axis > 0 else axis + data.dim() - 1)


def squeeze(data: Any, axes: Any = None) -> Any:
    """Squeeze: without axes every one of size 1; a list of the host becomes its only number."""
    if not isinstance(data, Tensor):
        return host.number(data)
    if axes is None:
        return data.squeeze()
    for axis in sorted((a % data.dim() for a in host.ints(axes)), reverse=True):
        data = data.squeeze(axis)
    return data


def unsqueeze(data: Any, axes: Any) -> Any:
    """Unsqueeze: axes as they count in the result; a number of the host becomes a list."""
    wanted = host.ints(axes)
    if not isinstance(data, Tensor):
        if not isinstance(data, list) and wanted in ([0], [-1]):
            return [data]
        data = host.tensor(data)
    rank = data.dim() + len(wanted)
    for axis in sorted(a % rank for a in wanted):
        data = data.unsqueeze(axis)
    return data


def transpose(data: Any, *, perm: list[int] | None = None) -> Any:
    """Transpose: without perm the axes in reverse."""
    if not isinstance(data, Tensor):
        return data
    order = perm or list(range(data.dim()))[::-1]
    moved = [i for i, p in enumerate(order) if i != p]
    if len(moved) == 2:
        return data.transpose(*moved)
    return data.permute(order) if moved else data


def concat(*parts: Any, axis: int) -> Any:
    """Concat: of values of the host alone a list there. Raises: MixedTypes."""
    if not any(isinstance(p, Tensor) for p in parts):
        return [v for p in parts for v in _vector(p)]
    host.same_type(*parts)
    like = next(p for p in parts if isinstance(p, Tensor))
    return torch.cat([host.tensor(_vector(p), like) for p in parts], axis)


def split(data: Any, sizes: Any = None, *, axis: int = 0, num_outputs: int = 0) -> tuple[Any, ...]:
    """num_outputs: where no sizes are given; the last part may be smaller."""
    count = len(data) if isinstance(data, list) else data.shape[axis]
    if sizes is None:
        each = -(-count // num_outputs)
        sizes = [min(each, count - i * each) for i in range(num_outputs)]
    sizes = host.ints(sizes)
    if isinstance(data, list):
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return tuple(data[e - s : e] for s, e in zip(sizes, ends, strict=True))
    return tuple(torch.split(data, sizes, axis))


def slice_(data: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    """Slice; backwards only a whole axis, in steps of -1. Raises: UnsupportedModel: any other negative step."""
    firsts, lasts = host.ints(starts), host.ints(ends)
    chosen = host.ints(axes) if axes is not None else list(range(len(firsts)))
    strides = host.ints(steps) if steps is not None else [1] * len(firsts)
    for first, last, axis, step in zip(firsts, lasts, chosen, strides, strict=True):
        if isinstance(data, list):
            data = data[first:last:step]
        elif step > 0:
            data = _sliced(data, axis, first, last, step)
        elif step == -1 and isinstance(first, int) and first in (-1, (1 << 63) - 1) and last < -(1 << 31):
            data = data.flip(axis)
        else:
            raise UnsupportedModel(f"a slice from {first} to {last} in steps of {step}")
    return data


def _sliced(data: Tensor, axis: int, first: Any, last: Any, step: int) -> Tensor:
    if isinstance(first, int) and first == 0 and isinstance(last, int) and last >= 1 << 31:
        return data if step == 1 else data[(slice(None),) * (axis % data.dim()) + (slice(None, None, step),)]
    if isinstance(last, int) and last >= 1 << 31:
        last = None
    return data[(slice(None),) * (axis % data.dim()) + (slice(first, last, step),)]


def expand(data: Any, wanted: Any) -> Any:
    """To the common shape of the data and the wanted one."""
    sizes, data = host.ints(wanted), host.tensor(data)
    rank = max(len(sizes), data.dim())
    sizes = [1] * (rank - len(sizes)) + sizes
    own = [1] * (rank - data.dim()) + list(data.shape)
    return data.expand([o if isinstance(w, int) and w == 1 else w for w, o in zip(sizes, own, strict=True)])


def tile(data: Any, repeats: Any) -> Any:
    """Tile; a list of the host stays there."""
    times = host.ints(repeats)
    if isinstance(data, list) and len(times) == 1 and isinstance(times[0], int):
        return data * times[0]
    return host.tensor(data).repeat(times)


def pad(data: Tensor, pads: Any, value: Any = None, axes: Any = None, *, mode: str = "constant") -> Tensor:
    """Pad with a constant. Raises: UnsupportedModel: another mode."""
    if mode != "constant":
        raise UnsupportedModel(f"pads by {mode}; constant is read")
    amounts, rank = host.ints(pads), data.dim()
    chosen = [a % rank for a in host.ints(axes)] if axes is not None else list(range(rank))
    first, last = amounts[: len(chosen)], amounts[len(chosen) :]
    by_axis = dict(zip(chosen, zip(first, last, strict=True), strict=True))
    flat = [n for axis in reversed(range(rank)) for n in by_axis.get(axis, (0, 0))]
    return F.pad(data, flat, value=0 if value is None else host.number(value))


def constant_of_shape(sizes: Any, *, value: float = 0.0, dtype: str = "float32") -> Any:
    """A list on the host where it is a short one of integers. dtype: by torch's name, from prepare.py."""
    wanted, kind = host.ints(sizes), getattr(torch, dtype)
    if kind in host.INTEGERS and len(wanted) == 1 and isinstance(wanted[0], int) and wanted[0] <= host.LONGEST:
        return [value] * wanted[0]
    return torch.full(wanted, value, dtype=kind)


def range_(start: Any, limit: Any, step: Any) -> Tensor:
    """Range: of whole numbers i64, else f32, unless a tensor among them says another type."""
    first, last, by = (host.number(v) for v in (start, limit, step))
    dtype = next((v.dtype for v in (start, limit, step) if isinstance(v, Tensor)), None)
    if dtype is None:
        dtype = torch.int64 if all(map(host.is_size, (first, last, by))) else torch.float32
    return torch.arange(first, last, by, dtype=dtype)


def sequence(*values: Any) -> list[Any]:
    """SequenceConstruct: a list, whatever its values are."""
    return list(values)


def sequence_at(values: list[Any], position: Any) -> Any:
    """SequenceAt; a negative position counts from the end."""
    return values[host.number(position)]


def concat_sequence(values: list[Any], *, axis: int, new_axis: int = 0) -> Any:
    """ConcatFromSequence; with new_axis it stacks."""
    if new_axis:
        return torch.stack([host.tensor(v) for v in values], axis)
    return concat(*values, axis=axis)


def split_to_sequence(data: Any, sizes: Any = None, *, axis: int = 0, keepdims: int = 1) -> list[Any]:
    """SplitToSequence: into parts of size 1, of one size (the last may be smaller), or of given sizes."""
    if sizes is None:
        parts = split(data, [1] * data.shape[axis], axis=axis)
        return list(parts) if keepdims else [p.squeeze(axis) for p in parts]
    if not isinstance(sizes, list):
        return list(torch.split(data, host.number(sizes), axis))
    return list(split(data, sizes, axis=axis))
