"""What the attention ops' plain meanings share: the sequences of a ragged batch, and which keys a query sees."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def sequences(slots: Tensor, positions: Tensor) -> Iterator[tuple[int, Tensor, Tensor, int]]:
    """Each sequence of a batch, slots and positions i64[T]: its slot, its rows i64[q], their positions i64[q], and its
    length after this step."""
    for s in slots.unique().tolist():
        rows = (slots == s).nonzero()[:, 0]
        p = positions[rows]
        yield s, rows, p, int(p.max()) + 1


def visible(p: Tensor, length: int, window: int = 0, chunk: int = 0) -> Tensor:
    """p i64[q] query positions -> bool[q, length]: which keys each query sees. window, chunk: 0 means none."""
    j = torch.arange(length, device=p.device)
    keep = j[None] <= p[:, None]
    if window:
        keep &= j[None] > p[:, None] - window
    if chunk:
        keep &= j[None] // chunk == p[:, None] // chunk
    return keep
