"""How to call a block with any rows, learnt from one sample call, and what it returns."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from moec.compiler.capture.lifting.refused import Refused

Key = int | str


@dataclasses.dataclass(frozen=True)
class Extra:
    """A second tensor argument with one entry per token.

    tail: its shape behind the token dimensions.  flat: its first dimension is all tokens.  is_mask: bool, or 0 and 1.
    """

    tail: tuple[int, ...]
    dtype: torch.dtype
    flat: bool
    is_mask: bool


class Call:
    """A sample call of a block: which argument holds the rows, and what else it takes.

    key: of the argument with the rows [.., H].  lead: the sample's shape without H.  extras: arguments per token.
    Raises: Refused("call"): no floating argument of two axes, or two of them.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.items: dict[Key, Any] = dict([*enumerate(args), *kwargs.items()])
        rows = [k for k, v in self.items.items() if isinstance(v, Tensor) and v.is_floating_point() and v.dim() >= 2]
        if not rows:
            raise Refused("call", "no floating tensor argument with at least two axes")
        self.key = rows[0]
        sample = self.items[self.key]
        self.hidden, self.lead, self.dtype = sample.shape[-1], tuple(sample.shape[:-1]), sample.dtype
        self.extras = {k: e for k, v in self.items.items() if (e := self._extra(k, v)) is not None}

    def _extra(self, key: Key, value: Any) -> Extra | None:
        if key == self.key or not isinstance(value, Tensor) or value.dim() == 0:
            return None
        mask = value.dtype == torch.bool or bool(((value == 0) | (value == 1)).all())
        if tuple(value.shape[: len(self.lead)]) == self.lead:
            return Extra(tuple(value.shape[len(self.lead) :]), value.dtype, False, mask)
        if value.shape[0] == self.items[self.key][..., 0].numel():
            return Extra(tuple(value.shape[1:]), value.dtype, True, mask)
        return None

    def shape_of(self, num_rows: int) -> tuple[int, ...]:
        """The leading axes for so many rows: all but the last are 1."""
        return (1,) * (len(self.lead) - 1) + (num_rows,)

    def bind(self, rows: Tensor, lead: tuple[int, ...] | None = None, mask: Tensor | None = None) -> dict[Key, Any]:
        """Arguments for rows [T, H]. mask: bool[T] for the arguments per token; None: ones."""
        lead = lead or self.shape_of(rows.shape[0])
        bound = {k: copy.deepcopy(v) for k, v in self.items.items() if k != self.key and k not in self.extras}
        bound[self.key] = rows.reshape(*lead, self.hidden).clone()
        for key, extra in self.extras.items():
            shape = (rows.shape[0],) if extra.flat else lead
            values = torch.ones(shape) if mask is None else mask.reshape(shape)
            full = values.reshape(shape + (1,) * len(extra.tail)).expand(shape + extra.tail)
            bound[key] = full.to(extra.dtype).contiguous()
        return bound

    def split(self, bound: dict[Key, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Bound arguments as positional and keyword ones."""
        return [bound[i] for i in range(len(self.args))], {k: bound[k] for k in self.kwargs}


def leaves(output: Any) -> list[Any]:
    """The parts of what a block returned, in order. Raises: Refused("call"): a container of another kind."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return list(output.values())
    if isinstance(output, list | tuple):
        return list(output)
    raise Refused("call", f"the block returns a {type(output).__name__}; tensors, tuples, lists and dicts are lifted")


def rebuilt(output: Any, values: list[Any]) -> Any:
    """The same container with other values."""
    if isinstance(output, Tensor):
        return values[0]
    if isinstance(output, dict):
        return dict(zip(output, values, strict=True))
    if hasattr(output, "_fields"):
        return type(output)(*values)
    return type(output)(values)


def main_index(output: Any, num_rows: int, hidden: int) -> int:
    """Which part of the output has the shape of the input. Raises: Refused("call"): none has."""
    for i, part in enumerate(leaves(output)):
        fits = isinstance(part, Tensor) and part.is_floating_point() and part.dim() >= 2
        if fits and part.shape[-1] == hidden and part.numel() == num_rows * hidden:
            return i
    raise Refused("call", "no output has the shape of the input")
