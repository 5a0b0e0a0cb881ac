"""Which sizes of a block are widths (hidden, inner) and can be shrunk: original size -> twin's size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moec.compiler.capture.lifting.refused import Refused
from moec.compiler.capture.lifting.slices import lists

SMALLEST = 192  # sizes from here on may be widths
TWIN_WIDTHS = (56, 88, 104, 136, 152, 184)
"""Twin sizes: multiples of 8 (blocks split widths in 2, 4 or 8) with prime factors that code rarely names."""
MAX_MULTIPLE = 4  # 2F for gate and up, 3F, 4H; larger multiples have to be numbers of experts


@dataclasses.dataclass(frozen=True)
class Widths:
    """sizes: original -> twin, all axes that change.  bases: those of which the others are multiples."""

    sizes: Mapping[int, int]
    bases: Mapping[int, int]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The twin's shape; sizes that are no width stay."""
        return tuple(self.sizes.get(s, s) for s in shape)

    def full(self, number: Any) -> Any:
        """A number of the twin's code as the original has it: a width, a multiple or the half of one, or its root."""
        if isinstance(number, bool) or not isinstance(number, int | float):
            return number
        if isinstance(number, float):
            return self._full_float(number)
        for original, twin in self.sizes.items():
            if number == twin:
                return original
        for original, twin in self.bases.items():
            if number and number % twin == 0:
                return number // twin * original
            if 2 * number == twin and original % 2 == 0:
                return original // 2
        return number

    def _full_float(self, number: float) -> float:
        for original, twin in self.sizes.items():
            for power in (-1.0, -0.5, 0.5, 1.0):
                if math.isclose(number, twin**power, rel_tol=1e-12):
                    return float(original**power)
        return number


def choices(tensors: Mapping[str, Tensor], hidden: int) -> Iterator[Widths]:
    """All widths, then the inner ones alone, then hidden alone; none where nothing is wide."""
    found = _widths(tensors, hidden)
    tried: list[dict[int, int]] = []
    for keep in (lambda s: True, lambda s: s != hidden, lambda s: s == hidden):
        bases = {s: n for s, n in found.bases.items() if keep(s)}
        sizes = {s: n for s, n in found.sizes.items() if s in bases or (s not in found.bases and bases == found.bases)}
        if len(bases) < len(found.bases):
            sizes |= _multiples(tensors, bases, _counts(tensors))
        if sizes and sizes not in tried:
            tried.append(sizes)
            yield Widths(sizes, bases)


def _counts(tensors: Mapping[str, Tensor]) -> set[int]:
    """Sizes that may be numbers of experts: lengths of lists and leading axes of stacks, else small axes."""
    listed = {n for names in lists(tensors) for n in names}
    counts = {len(names) for names in lists(tensors)}
    counts |= {t.shape[0] for t in tensors.values() if t.dim() >= 3}
    if not counts:
        counts = {s for n, t in tensors.items() if n not in listed for s in t.shape if s < SMALLEST}
    return {c for c in counts if c > 1}


def _widths(tensors: Mapping[str, Tensor], hidden: int) -> Widths:
    counts = _counts(tensors) - {hidden}
    sizes = sorted({s for t in tensors.values() for s in t.shape if s >= SMALLEST} - counts)
    bases: dict[int, int] = {}
    made: dict[int, int] = {}
    free = [w for w in TWIN_WIDTHS if w not in counts]
    for size in sorted({*sizes, hidden} if hidden >= SMALLEST else sizes, key=lambda s: (s != hidden, s)):
        multiple = _multiple(size, bases, counts)
        if multiple is not None:
            made[size] = multiple
            continue
        if not free:
            break
        count = max((c for c in counts if size % c == 0 and size // c >= SMALLEST), default=1)
        inner = size // count if _flat(tensors, size) else size
        bases[inner] = free.pop(0)
        made[size] = size // inner * bases[inner]
    return Widths(bases | made, bases)


def _flat(tensors: Mapping[str, Tensor], size: int) -> bool:
    """Whether the size is an axis of matrices only that stand alone: experts may lie one after the other on it."""
    listed = {n for names in lists(tensors) for n in names}
    return all(t.dim() <= 2 and n not in listed for n, t in tensors.items() if size in t.shape)


def _multiple(size: int, bases: Mapping[int, int], counts: set[int]) -> int | None:
    """The twin's size of a multiple of a base; the smallest factor counts (2F before 7H)."""
    found = [(size // s, n) for s, n in bases.items() if size % s == 0 and size > s]
    fitting = [(c, n) for c, n in found if c <= MAX_MULTIPLE or c in counts or (c % 2 == 0 and c // 2 in counts)]
    return min(fitting)[0] * min(fitting)[1] if fitting else None


def _multiples(tensors: Mapping[str, Tensor], bases: Mapping[int, int], counts: set[int]) -> dict[int, int]:
    every = {s for t in tensors.values() for s in t.shape if s >= SMALLEST} - counts
    return {s: m for s in every if s not in bases and (m := _multiple(s, bases, counts)) is not None}


def narrowed(tensor: Tensor, widths: Widths) -> Tensor:
    """The first rows and columns of a tensor; matrices are scaled up, so that sums keep their size.

    Raises: Refused("width"): integers lie on an axis that shrinks.
    """
    shape = widths.shape(tuple(tensor.shape))
    if shape == tuple(tensor.shape):
        return tensor.detach().clone()
    part = tensor.detach()
    for axis, size in enumerate(shape):
        part = part.narrow(axis, 0, size)
    if not tensor.is_floating_point():
        if tensor.dtype not in (torch.int8, torch.uint8):
            raise Refused("width", "a tensor of integers has an axis as long as a width")
        return part.clone()
    shrunk = [o / n for o, n in zip(tensor.shape, shape, strict=True) if o != n]
    scale = math.prod(shrunk) ** (0.5 / len(shrunk)) if tensor.dim() >= 2 else 1.0
    return (part * scale).contiguous()
