"""Values that are numbers on the host while a graph runs: sizes, axes, scalars; and how they meet tensors.

An ONNX graph computes with shapes as with any other integers. Here a value is a tensor, or on the host: a number, or a
flat list of numbers. Sizes of a trace are SymInts and stay symbolic through the arithmetic on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.compiler.errors import UnsupportedModel

LONGEST = 64
"""Integer constants of so many elements and of at most one axis stay on the host."""
LARGEST = float(np.finfo(np.float32).max)
INTEGERS = (torch.int64, torch.int32)


class MixedTypes(UnsupportedModel):
    """An operation reads tensors of two types where ONNX asks for one."""


def constant(value: Tensor) -> Any:
    """A constant as it is used: small integers and single numbers on the host, all else as the tensor."""
    small = value.dtype in INTEGERS or value.dtype is torch.bool
    if small and value.dim() <= 1 and value.numel() <= LONGEST:
        return value.tolist()
    if value.dtype is torch.float32 and value.numel() == 1 and value.dim() <= 1:
        return shortest(float(value))
    return value


def shortest(value: float) -> float:
    """The number with the fewest digits that rounds to the same float32: 1.702 for 1.7020000219345093.

    In float32 nothing changes; in float64, in which blocks are measured, it is the number that was meant.
    """
    short = float(str(np.float32(value)))
    return value if abs(short) > LARGEST else short  # the largest float32, as masks have, is rounded up in decimals


def is_size(value: Any) -> bool:
    """Whether a value is an integer of the host, symbolic or not."""
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def tensor(value: Any, like: Tensor | None = None) -> Tensor:
    """A value as a tensor; numbers of the host take the dtype of `like` where they are of its kind."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list) and not all(isinstance(v, int | float) for v in value):
        made = torch.stack([tensor(v) for v in value])
    elif isinstance(value, list):
        made = torch.tensor(value, dtype=_dtype(value[0] if value else 0))
    else:
        made = torch.full((), value, dtype=_dtype(value))
    if like is not None and like.dtype is not torch.bool and made.dtype is not torch.bool:
        made = made.to(like.dtype)
    return made


def _dtype(value: Any) -> torch.dtype:
    if isinstance(value, bool | torch.SymBool):
        return torch.bool
    return torch.float32 if isinstance(value, float | torch.SymFloat) else torch.int64


def ints(value: Any) -> list[Any]:
    """Sizes, axes or indices as a list on the host. A tensor's values are read, which a trace refuses."""
    if isinstance(value, Tensor):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else [value]


def number(value: Any) -> Any:
    """A single number on the host."""
    if isinstance(value, Tensor):
        return value.reshape(()).item()
    return value[0] if isinstance(value, list) else value


def same_type(*values: Any) -> None:
    """Raises: MixedTypes: two of the tensors have different dtypes."""
    dtypes = list(dict.fromkeys(v.dtype for v in values if isinstance(v, Tensor)))
    if len(dtypes) > 1:
        raise MixedTypes(f"reads {dtypes[0]} and {dtypes[1]} where one type is asked for; add a Cast")


def paired(a: Any, b: Any, of_numbers: Callable[[Any, Any], Any], of_tensors: Callable[[Any, Any], Any]) -> Any:
    """An elementwise operation: on the host where both are there, else on tensors of one type."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        same_type(a, b)
        if isinstance(a, list):
            a = tensor(a, b)
        if isinstance(b, list):
            b = tensor(b, a)
        return of_tensors(a, b)
    if isinstance(a, list) or isinstance(b, list):
        xs, ys = (v if isinstance(v, list) else [v] for v in (a, b))
        count = max(len(xs), len(ys)) if xs and ys else 0
        if not {len(xs), len(ys)} <= {1, count}:
            raise UnsupportedModel(f"lists of {len(xs)} and {len(ys)} numbers do not match")
        return [of_numbers(xs[i % len(xs)], ys[i % len(ys)]) for i in range(count)]
    return of_numbers(a, b)


def each(value: Any, of_number: Callable[[Any], Any], of_tensor: Callable[[Any], Any]) -> Any:
    """An operation on one value, wherever it is."""
    if isinstance(value, Tensor):
        return of_tensor(value)
    return [of_number(v) for v in value] if isinstance(value, list) else of_number(value)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """To another type; a number of the host that a Python number can hold exactly stays there."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    if dtype in INTEGERS:
        return each(value, lambda v: v if is_size(v) else int(v), lambda t: t)
    if dtype is torch.bool:
        return each(value, bool, lambda t: t)
    if dtype in (torch.float32, torch.float64):
        return each(value, lambda v: torch.sym_float(v) if isinstance(v, torch.SymInt) else float(v), lambda t: t)
    return tensor(value).to(dtype)


def truncated(a: Any, b: Any) -> Any:
    """ONNX's division of two numbers: of integers towards zero. Sizes are never negative."""
    if is_size(a) and is_size(b):
        if isinstance(a, int) and isinstance(b, int):
            return math.trunc(a / b) if abs(a) < 1 << 52 else a // b
        return a // b
    return a / b
