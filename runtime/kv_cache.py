"""The caches of one engine: a fixed number of slots, each holding one sequence of bounded length.

What is kept of each token (keys, values) takes part of a slot's length; a state has the same size for every length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from moec.runtime.constants import CPU
from moec.runtime.errors import ContextError


@dataclasses.dataclass(frozen=True)
class CacheInput:
    """One cache tensor of the program.

    shape: of one entry.  kind: "tokens": an entry for each token; "state": one for each sequence.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str = "tokens"


class KVCache:
    """Slots and their lengths.

    tensors: one per cache input, in the program's order: [num_slots, length, *shape] of what is kept of tokens,
        [num_slots, *shape] of states, which are zero in empty slots.

    Args: length: tokens that a slot can hold.  max_positions: the model's own limit, 0 where it has none.
        device: of the tensors.  spare_slots: more slots in the tensors, which no sequence gets.  by_head: in memory the
        entries of one head follow each other, where entries are [heads, width]: the processor's kernels read head
        after head, and memory is fastest in its own order. The tensors' shapes are the same.
    Memory is zeroed once: masked-out places are multiplied by zero, and stale bytes might be NaN.
    """

    def __init__(
        self,
        inputs: Sequence[CacheInput],
        num_slots: int,
        length: int,
        max_positions: int = 0,
        device: torch.device = CPU,
        spare_slots: int = 0,
        by_head: bool = False,
    ) -> None:
        if max_positions and length > max_positions:
            raise ContextError(
                f"a cache of {length} tokens per sequence is longer than the model's context of {max_positions}; "
                f"ask for fewer new tokens or a shorter prompt"
            )
        self.num_slots, self.length = num_slots, length
        self.lengths = [0] * num_slots
        self._device, self._places, self._by_head = device, num_slots + spare_slots, by_head
        self.tensors = [self._zeros(c) for c in inputs]
        self._states = [t for t, c in zip(self.tensors, inputs, strict=True) if c.kind == "state"]
        self._free = list(range(num_slots))

    def _zeros(self, cache: CacheInput) -> torch.Tensor:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=getattr(torch, cache.dtype), device=self._device)

        if cache.kind == "state":
            return zeros(self._places, *cache.shape)
        if self._by_head and len(cache.shape) == 2:
            num_heads, width = cache.shape
            return zeros(self._places, num_heads, self.length, width).transpose(1, 2)
        return zeros(self._places, self.length, *cache.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of all caches, used or not."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def allocate(self) -> int:
        """A free slot, the lowest, now empty. Raises: ContextError: all are taken."""
        if not self._free:
            raise ContextError(f"all {self.num_slots} cache slots are in use; release one or make a larger cache")
        slot = self._free.pop(0)
        self.lengths[slot] = 0
        self.clear_states([slot])
        return slot

    def clear_states(self, slots: Sequence[int]) -> None:
        """Makes the states of slots those of empty sequences."""
        for state in self._states:
            for slot in slots:
                state[slot].zero_()

    def release(self, slot: int) -> None:
        """Gives a slot back; its sequence is gone."""
        if slot not in self._free:
            self._free = sorted([*self._free, slot])

    def extend(self, slots: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Makes room for the next tokens of some sequences -> the place of the first new one of each.

        Raises: ContextError: no such slot, or one would overrun; nothing has changed then.
        """
        for slot, count in zip(slots, counts, strict=True):
            if not 0 <= slot < self.num_slots:
                raise ContextError(f"there is no cache slot {slot}; the cache has {self.num_slots}")
            if self.lengths[slot] + count > self.length:
                raise ContextError(
                    f"the sequence in slot {slot} has {self.lengths[slot]} tokens: {count} more overrun the cache of "
                    f"{self.length}; make a longer cache or end the sequence"
                )
        starts = [self.lengths[slot] for slot in slots]
        for slot, count in zip(slots, counts, strict=True):
            self.lengths[slot] += count
        return starts
