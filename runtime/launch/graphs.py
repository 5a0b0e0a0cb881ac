"""Decode steps as CUDA graphs: one launch by the host instead of hundreds.

A graph is captured for a padded number of rows and an end of the caches, the second time that such a step comes: the
first runs as it is, which lets libraries make their handles. Rows that pad belong to a spare slot of the cache, which
no sequence has. Memory of a graph stays where it is: it holds the arena's block, and inputs and outputs of its own.
"""

from __future__ import annotations

import bisect
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from moec.runtime.batch import Batch
from moec.runtime.errors import DeviceMemoryError, InputError
from moec.runtime.executor import Executor
from moec.runtime.kv_cache import KVCache
from moec.runtime.launch.cuda_device import Device, free_memory
from moec.runtime.launch.library import WAITS
from moec.runtime.program import Program, Step

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""The padded numbers of rows."""
SHORTEST = 256  # ends of caches are powers of two from here on


def padded(rows: Tensor, holds: int, spare: int) -> Tensor:
    """i64[3, T] -> i64[3, holds]; rows that pad have the first one's token and place 0 of the spare slot."""
    wide = torch.empty((3, holds), dtype=torch.int64)
    wide[0], wide[1], wide[2] = rows[0, 0], 0, spare
    wide[:, : rows.shape[1]] = rows
    return wide


def on_device(rows: Tensor, device: Device) -> Tensor:
    """i64[3, T] of the host on the device, each row at a multiple of 64 bytes for the kernels. Waits for nothing."""
    count = rows.shape[1]
    wide = torch.empty((3, count + -count % 8), dtype=torch.int64, device=device.torch_device)[:, :count]
    return wide.copy_(rows, non_blocking=True)


def graph_refusal(program: Program) -> str | None:
    """Why decode steps of a program cannot be graphs, or None: what the host decides or waits for in a step."""
    for step in _steps_of_decode(program.steps):
        if step.kind == "collective":
            return f"node {step.node} talks to other ranks"
        if step.kind == "library" and step.name in WAITS:
            return f"node {step.node} ({step.name}) waits for the device"
    return None


def _steps_of_decode(steps: Sequence[Step]) -> Iterator[Step]:
    """The steps that run for up to ROWS[-1] rows."""
    for step in steps:
        yield step
        for limit, inner in step.variants:
            yield from _steps_of_decode(inner)
            if limit is not None and limit >= ROWS[-1]:
                break


@dataclasses.dataclass
class DecodeGraph:
    """A captured step. rows: i64[3, P], tokens, positions and slots.  logits: [P, V], filled by a replay.

    spare: the slot of rows that pad.  kept: memory that the graph reads and writes.
    """

    rows: Tensor
    spare: int
    logits: Tensor
    replay: Callable[[], None]
    kept: tuple[Tensor, ...]

    def run(self, rows: Tensor) -> Tensor:
        """i64[3, T] on the host -> logits [T, V], good until the next replay. Raises: InputError: T above P."""
        count, holds = rows.shape[1], self.rows.shape[1]
        if count > holds:
            raise InputError(f"the graph was captured for {holds} tokens, got {count}; capture one for more")
        self.rows.copy_(padded(rows, holds, self.spare), non_blocking=True)
        self.replay()
        return self.logits[:count]


class DecodeGraphs:
    """The graphs of an engine, by cache. executor: what they run, without graph_refusal.  device: captures."""

    def __init__(self, executor: Executor, device: Device, selects_rows: bool) -> None:
        self.executor, self._device, self._selects_rows = executor, device, selects_rows
        self._by_cache: weakref.WeakKeyDictionary[KVCache, dict[tuple[int, int], DecodeGraph | None]]
        self._by_cache = weakref.WeakKeyDictionary()

    def fits(self, count: int) -> bool:
        """Whether steps of so many rows are graphs."""
        return 0 < count <= ROWS[-1]

    def run(self, cache: KVCache, rows: Tensor, longest: int) -> Tensor:
        """rows i64[3, T] on the host: tokens, positions, slots; longest: the end of the longest sequence.

        -> logits [T, V], good until the next step. Raises: StepError, DeviceMemoryError.
        """
        holds = ROWS[bisect.bisect_left(ROWS, rows.shape[1])]
        end = min(cache.length, max(SHORTEST, 1 << (longest - 1).bit_length()))
        graphs = self._by_cache.setdefault(cache, {})
        graph = graphs.get((holds, end))
        if graph is not None:
            return graph.run(rows)
        static = on_device(padded(rows, holds, cache.num_slots), self._device)
        inputs = self._inputs(cache, static)
        if (holds, end) not in graphs:
            graphs[holds, end] = None
            return self.executor(inputs, Batch.of_decode(static[1], end))[0][: rows.shape[1]]
        graph = graphs[holds, end] = self._capture(cache, static, inputs, end)
        return graph.run(rows)

    def _inputs(self, cache: KVCache, static: Tensor) -> list[Tensor]:
        wanted = torch.arange(static.shape[1], device=static.device)
        return [*static.unbind(0), *cache.tensors, *([wanted] if self._selects_rows else [])]

    def _capture(self, cache: KVCache, static: Tensor, inputs: list[Tensor], end: int) -> DecodeGraph:
        try:
            replay, outputs = self._device.capture(lambda: self.executor(inputs, Batch.of_decode(static[1], end)))
        except torch.OutOfMemoryError:
            outputs = None
        if outputs is None:
            raise DeviceMemoryError(
                f"no memory for the graph of {static.shape[1]} tokens: {free_memory(self._device)}; decode fewer "
                "sequences at a time, or make a smaller cache"
            )
        return DecodeGraph(static, cache.num_slots, outputs[0], replay, (self.executor.frames.block, *inputs))
