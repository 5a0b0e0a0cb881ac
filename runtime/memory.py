"""The arena: one block for all kernel outputs and workspaces, cut up by the compiler's memory plan.

The views into the block depend on the symbolic sizes alone, so they are made once per set of sizes and kept: a decode
loop pays for them in its first step only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moec.runtime.constants import CPU
from moec.runtime.errors import FormatError
from moec.runtime.expressions import evaluate
from moec.runtime.pages import HUGE_PAGE_BYTES, empty_aligned, empty_huge
from moec.runtime.program import Buffer, Program

ALIGN_BYTES = 64
MAX_FRAMES = 64


class Frames:
    """The arena's buffers by sizes. The block grows when a larger set of sizes is asked for, and never shrinks.

    Args: symbols: those that sizes in the arena depend on.  more: (arena buffers, *sizes) -> the program's views.
        to_kernel, device: see Executor.
    """

    def __init__(
        self,
        program: Program,
        symbols: Sequence[str],
        more: Callable[..., Sequence[Tensor]],
        to_kernel: Callable[[Tensor], Any],
        device: torch.device = CPU,
    ) -> None:
        self._device = device
        self._program, self._symbols, self._more, self._to_kernel = program, symbols, more, to_kernel
        self._buffers = [b for b in program.buffers if b.kind == "arena"]
        self._frames: dict[tuple[int, ...], tuple[Any, ...]] = {}
        self._block = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def block(self) -> Tensor:
        """The memory itself, u8[num_bytes]; another one once more is asked for."""
        return self._block

    @property
    def num_bytes(self) -> int:
        """Bytes that the arena holds now."""
        return self._block.numel()

    def at(self, sizes: tuple[int, ...]) -> tuple[Any, ...]:
        """For the values of the symbols: the arena's buffers, their views, and all of these again as kernels take them.

        Their contents are undefined.
        """
        frame = self._frames.get(sizes)
        return self._make(sizes) if frame is None else frame

    def _make(self, sizes: tuple[int, ...]) -> tuple[Any, ...]:
        values = dict(zip(self._symbols, sizes, strict=True))
        needed = evaluate(self._program.arena_bytes, values)
        if needed > self._block.numel():
            self._frames.clear()
            self._block = self._block[:0].clone()  # the old one may be what the new one needs
            self._block = self._empty(needed)
        if len(self._frames) >= MAX_FRAMES:
            self._frames.clear()
        views = [self._view(b, values) for b in self._buffers]
        views += self._more(views, *sizes)
        frame = (*views, *map(self._to_kernel, views))
        self._frames[sizes] = frame
        return frame

    def _empty(self, num_bytes: int) -> Tensor:
        if self._device != CPU:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)  # a GPU's blocks start at 512 bytes
        return empty_huge(num_bytes) if num_bytes >= HUGE_PAGE_BYTES else empty_aligned(num_bytes, ALIGN_BYTES)

    def _view(self, buffer: Buffer, values: dict[str, int]) -> Tensor:
        dtype = getattr(torch, buffer.dtype)
        shape = [evaluate(d, values) for d in buffer.shape]
        num_bytes = dtype.itemsize
        for n in shape:
            num_bytes *= n
        start = evaluate(buffer.offset or 0, values)
        if start < 0 or start + num_bytes > self._block.numel():
            raise FormatError(f"program.json: buffer {buffer.name} lies outside of the arena; make the engine again")
        return self._block[start : start + num_bytes].view(dtype).view(shape)
