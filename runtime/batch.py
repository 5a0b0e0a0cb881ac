"""What the host knows about one ragged batch: which rows belong to which sequence, and which keys each row sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Rows start..stop (half-open) of the batch are the places position, position+1, .. of the sequence in `slot`."""

    slot: int
    start: int
    stop: int
    position: int

    @property
    def end(self) -> int:
        """The sequence's length after this step."""
        return self.position + self.stop - self.start


@dataclasses.dataclass
class Batch:
    """The runs of one step in row order; a slot occurs in one run only. Shared by all layers, and so are its masks.

    positions: i64[T] of a decode step on another device than the CPU: masks are made there, and see keys 0..longest, so
        that nothing is copied to the device and a captured graph serves every step whose sequences end by `longest`.
    """

    runs: tuple[Run, ...]
    positions: Tensor | None = None
    _masks: dict[tuple[int, int], tuple[int, int, Tensor]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.num_rows = self.runs[-1].stop if self.runs else 0
        self.is_decode = all(r.stop - r.start == 1 for r in self.runs)
        self.longest = max((r.end for r in self.runs), default=0)
        self.slots_are_rows = self.is_decode and all(r.slot == r.start for r in self.runs)

    @classmethod
    def of(cls, slots: Tensor, positions: Tensor) -> Batch:
        """Reads the runs out of slots, positions i64[T]. Needs the rows of a slot to be neighbours, in rising order."""
        runs: list[Run] = []
        for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
            if runs and runs[-1].slot == slot and runs[-1].end == position:
                runs[-1] = runs[-1]._replace(stop=row + 1)
            else:
                runs.append(Run(slot, row, row + 1, position))
        if len({r.slot for r in runs}) < len(runs):
            raise ValueError("the rows of one slot are not consecutive positions next to each other in the batch")
        return cls(tuple(runs))

    @classmethod
    def of_decode(cls, positions: Tensor, longest: int) -> Batch:
        """One row per sequence, whose places the device alone knows: none is at or past `longest`."""
        batch = cls(tuple(Run(i, i, i + 1, 0) for i in range(len(positions))), positions)
        batch.longest, batch.slots_are_rows = longest, False
        return batch

    @classmethod
    def of_lengths(cls, slots: Sequence[int], lengths: Sequence[int], positions: Sequence[int]) -> Batch:
        """One run per sequence: its slot, its number of new rows, and the place of the first of them."""
        runs, at = [], 0
        for slot, length, position in zip(slots, lengths, positions, strict=True):
            runs.append(Run(slot, at, at + length, position))
            at += length
        return cls(tuple(runs))

    def decode_mask(self, window: int, chunk: int) -> tuple[int, int, Tensor]:
        """Of a decode batch -> first, end, bool[T, 1, 1, end - first]: keys that any row sees, and who sees which."""
        key = (window, chunk)
        if key not in self._masks and self.positions is not None:
            keep = visible(self.positions, 0, self.longest, window, chunk)
            self._masks[key] = (0, self.longest, keep[:, None, None])
        elif key not in self._masks:
            positions = torch.tensor([r.position for r in self.runs])
            first = min((first_visible(r.position, window, chunk) for r in self.runs), default=0)
            keep = visible(positions, first, self.longest, window, chunk)
            self._masks[key] = (first, self.longest, keep[:, None, None])
        return self._masks[key]


def first_visible(position: int, window: int, chunk: int) -> int:
    """The first key that the query at `position` sees; window, chunk: 0 means none."""
    first = max(0, position - window + 1) if window else 0
    return max(first, position // chunk * chunk) if chunk else first


def visible(positions: Tensor, first: int, end: int, window: int, chunk: int) -> Tensor:
    """positions i64[q] -> bool[q, end - first]: which of the keys first..end each query sees."""
    p = positions[:, None]
    j = torch.arange(first, end, device=positions.device)
    keep = j <= p
    if window:
        keep = keep & (j > p - window)
    if chunk:
        keep = keep & (j // chunk == p // chunk)
    return keep
