"""Engines on a GPU: batches and caches on the device, decode steps as graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.runtime.batch import Batch
from moec.runtime.engine import Engine
from moec.runtime.errors import DeviceMemoryError
from moec.runtime.executor import Executor
from moec.runtime.format import PROGRAM, read_json
from moec.runtime.kv_cache import CacheInput, KVCache
from moec.runtime.launch.cuda_device import Device, free_memory, gib, load_kernels, open_device, to_device
from moec.runtime.launch.graphs import DecodeGraphs, graph_refusal, on_device
from moec.runtime.loader import check_engine, map_weights, weights_file
from moec.runtime.options import LoadOptions
from moec.runtime.program import Program, Step
from moec.runtime.source import Place


def load_cuda(
    directory: Path, manifest: dict[str, Any], options: LoadOptions, device: Device | str | None
) -> CudaEngine:
    """An engine of one rank on a GPU. The device is checked first, then the files, then weights are copied.

    Raises: TargetError, CudaError: no such device, or not what the engine is for.  FormatError: damaged files.
        DeviceMemoryError: the weights do not fit.
    """
    gpu = open_device(manifest, device)
    check_engine(directory, manifest, options)
    return CudaEngine(directory, manifest, open_cuda(directory, manifest, options, gpu), gpu)


def open_cuda(
    directory: Path,
    manifest: dict[str, Any],
    options: LoadOptions,
    gpu: Device,
    collective: Callable[[Step], Callable[..., Any]] | None = None,
) -> Executor:
    """The ready program of one rank; the files are checked. collective: as for Executor. Raises: as load_cuda."""
    content = read_json(directory / PROGRAM)
    program = Program.from_json(content["ranks"][options.rank])
    kernels = load_kernels(directory, content.get("kernels", {}), gpu)
    weights = to_device(map_weights(directory / weights_file(manifest, options.rank)), gpu)
    place = Place(gpu.torch_device, "cuda", gpu.multiprocessors, gpu.synchronise, lambda: free_memory(gpu))
    return Executor(program, weights, kernels, collective=collective, place=place)


class CudaEngine(Engine):
    """An engine on a GPU; logits stay there. graph_refusal: why decode steps are no graphs, None where they are."""

    def __init__(self, directory: Path, manifest: dict[str, Any], executor: Executor, device: Device) -> None:
        super().__init__(directory, manifest, executor)
        self.device, self.graph_refusal = device, graph_refusal(executor.program)
        if any(c.kind == "state" for c in self._caches):
            self.graph_refusal = "the model keeps states"
        self._graphs = DecodeGraphs(executor, device, self._selects_rows) if self.graph_refusal is None else None

    def __call__(self, *inputs: Any) -> Any:
        """See Engine; tensors of a plain module are brought to the device."""
        if self.kind != "language_model":
            inputs = tuple(x.to(self.device.torch_device) if isinstance(x, Tensor) else x for x in inputs)
        return super().__call__(*inputs)

    def new_cache(self, num_sequences: int, length: int) -> KVCache:
        """See Engine. Raises: DeviceMemoryError: it does not fit beside the weights."""
        self._check_cache()
        try:
            return KVCache(
                self._caches, num_sequences, length, self.max_positions, self.device.torch_device, spare_slots=1
            )
        except torch.OutOfMemoryError:
            needed = (num_sequences + 1) * sum(_slot_bytes(c, length) for c in self._caches)
        raise DeviceMemoryError(
            f"a cache of {num_sequences} sequences of {length} tokens takes {gib(needed)}, {free_memory(self.device)}; "
            "ask for fewer sequences or shorter ones"
        )

    def _run(
        self, cache: KVCache, slots: Sequence[int], tokens: Sequence[Sequence[int]], wanted: Tensor | None = None
    ) -> Tensor:
        rows, batch = self._rows(cache, slots, tokens)
        as_graph = self._graphs is not None and self._graphs.executor is self.executor  # not while routing is recorded
        if batch.is_decode and self._graphs is not None and as_graph and self._graphs.fits(rows.shape[1]):
            return self._graphs.run(cache, rows, batch.longest).clone()
        inputs, batch = self._inputs(cache, rows, batch, wanted)
        logits = self.executor(inputs, batch)[0]
        return logits if self._selects_rows or wanted is None else logits[wanted.to(logits.device)]

    def profile(self, *inputs: Any) -> list[dict[str, Any]]:
        """See Engine; the device is idle before and after each step. One prefill, no graph."""
        if self.kind != "language_model":
            timed = self.executor.profile([x.to(self.device.torch_device) for x in inputs])
        else:
            sequences = self._sequences(inputs[0])
            cache = self.new_cache(len(sequences), max(map(len, sequences)))
            rows, batch = self._rows(cache, [cache.allocate() for _ in sequences], sequences)
            timed = self.executor.profile(*self._inputs(cache, rows, batch, None))
        return [{"node": s.node, "kind": s.kind, "name": s.name, "us": us} for s, us in timed]

    def _rows(self, cache: KVCache, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Batch]:
        """-> i64[3, T] on the host: tokens, positions, slots; and what the host knows of them."""
        self._check_slots(slots)
        lengths = [len(t) for t in tokens]
        batch = Batch.of_lengths(slots, lengths, cache.extend(slots, lengths))
        places = [(run.position + i, run.slot) for run in batch.runs for i in range(run.stop - run.start)]
        flat = [t for sequence in tokens for t in sequence]
        return torch.tensor([flat, *zip(*places, strict=True)]), batch

    def _inputs(self, cache: KVCache, rows: Tensor, batch: Batch, wanted: Tensor | None) -> tuple[list[Tensor], Batch]:
        """The program's inputs on the device, and the batch as steps there want it."""
        inputs = [*on_device(rows, self.device).unbind(0)]
        if batch.is_decode:
            batch = Batch.of_decode(inputs[1], batch.longest)
        inputs += cache.tensors
        if self._selects_rows:
            ends = torch.arange(rows.shape[1]) if wanted is None else wanted
            inputs.append(ends.to(self.device.torch_device, non_blocking=True))
        return inputs, batch


def _slot_bytes(cache: CacheInput, length: int) -> int:
    count = torch.Size(cache.shape).numel() * (length if cache.kind == "tokens" else 1)
    return count * getattr(torch, cache.dtype).itemsize
