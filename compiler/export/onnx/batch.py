"""What the slots, positions and caches of a ragged graph are in a batch of rows.

Letters: B sequences (rows), S new tokens of each, P earlier ones, L = P + S, T = B*S. A row is a slot; a token's position
is how many tokens (mask 1) lie before it in its row. Rows of padding (mask 0) are computed and mean nothing; nobody
sees their keys.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moec.compiler.export.onnx.interface import CachePort


@dataclasses.dataclass(frozen=True)
class CacheName:
    """Stands for a cache input of the ragged graph, which reads and writes it through Batch only."""

    name: str


class Batch:
    """One call of a language model.

    Args: ids i64[B,S], mask i64[B,L].  pasts: the past tensors, in the order of `ports`.
    """

    def __init__(self, ids: Tensor, mask: Tensor, ports: tuple[CachePort, ...], pasts: tuple[Tensor, ...]) -> None:
        self.rows, self.columns = ids.shape
        self.mask = mask
        before = (mask.cumsum(1) - 1).clamp(min=0)  # [B, L]
        self.key_positions = before
        self.query_positions = before.narrow(1, mask.shape[1] - self.columns, self.columns)
        self.past = {port.spec.name: past for port, past in zip(ports, pasts, strict=True)}
        self.present: dict[str, Tensor] = {}
        self._seen: dict[tuple[int, int], Tensor] = {}
        self.ids = ids

    @property
    def ragged(self) -> dict[str, Tensor]:
        """The ragged graph's own inputs: tokens, positions, slots i64[T]."""
        slots = torch.arange(self.rows, device=self.ids.device)[:, None].expand(self.rows, self.columns)
        return {
            "tokens": self.ids.reshape(-1),
            "positions": self.query_positions.reshape(-1),
            "slots": slots.reshape(-1),
        }

    def rows_of(self, x: Tensor) -> Tensor:
        """[T, ..] -> [B, S, ..]."""
        return x.reshape(self.rows, self.columns, *x.shape[1:])

    def append(self, cache: CacheName, new: Tensor) -> Tensor:
        """Puts new entries [T, ..] behind the past of a cache and gives all: [B, C, L, D], or [B, L, C] for latents."""
        entries = self.rows_of(new)
        if entries.dim() == 4:
            entries = entries.transpose(1, 2)
        past = self.past[cache.name]
        self.present[cache.name] = torch.cat([past, entries.to(past.dtype)], -2)
        return self.present[cache.name]

    def seen(self, window: int, chunk: int) -> Tensor:
        """bool[B, 1, S, L]: which keys each query sees; window, chunk: as in moec::cached_attention."""
        if (window, chunk) not in self._seen:
            key, query = self.key_positions[:, None, :], self.query_positions[:, :, None]
            keep = (key <= query) & (self.mask != 0)[:, None, :]
            if window:
                keep = keep & (key > query - window)
            if chunk:
                keep = keep & (key // chunk == query // chunk)
            self._seen[window, chunk] = keep[:, None]
        return self._seen[window, chunk]
