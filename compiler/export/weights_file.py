"""Writes a safetensors file one tensor at a time, every tensor at a multiple of 64 bytes.

The whole model is never in memory: a weight is made, written and dropped. The format allows no holes, so the gaps are
tensors of their own, named ".pad<n>".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.compiler.capture.tensors import COMPUTED
from moec.compiler.errors import CheckpointError
from moec.compiler.lowering.packing import Scales, make
from moec.passes.ir.weights import Read, Weight
from moec.runtime.format import WEIGHTS_ALIGN_BYTES

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
}

Progress = Callable[[int, int], None]


def write_weights(
    path: Path,
    weights: Mapping[str, Weight],
    read: Read,
    progress: Progress | None = None,
) -> None:
    """Writes the weights in the mapping's order. progress: (bytes written, bytes in all).

    Raises: CheckpointError: a source tensor is absent, has another shape, or holds NaN or infinity.  OSError: the disk
        is full.
    Cost: reads every source once per weight that names it, for codes and scales together; holds one weight in memory.
    """
    scales = Scales()
    with WeightsFile(path, weights, progress) as file:
        for name, weight in weights.items():
            with making(name, weight):
                tensor = make(weight, read, scales)
            file.write(name, checked(name, weight, tensor, read))
            del tensor  # before the next one is made


class WeightsFile(AbstractContextManager["WeightsFile"]):
    """A file under way: its weights are written in the mapping's order. progress: (bytes written, bytes in all)."""

    def __init__(self, path: Path, weights: Mapping[str, Weight], progress: Progress | None) -> None:
        header, self._total = _header(weights)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % WEIGHTS_ALIGN_BYTES)
        self._weights, self._progress, self._done = weights, progress, 0
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """The next weight. tensor: as `checked` gives it."""
        num_bytes = self._weights[name].num_bytes
        self._file.write(tensor.view(torch.uint8).numpy().data if tensor.numel() else b"")
        self._file.write(b"\0" * (-num_bytes % WEIGHTS_ALIGN_BYTES))
        self._done += num_bytes
        if self._progress:
            self._progress(self._done, self._total)

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _header(weights: Mapping[str, Weight]) -> tuple[dict[str, Any], int]:
    """The safetensors header and the number of weight bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = total = 0
    for name, weight in weights.items():
        end = at + weight.num_bytes
        header[name] = {"dtype": DTYPE_CODES[weight.dtype], "shape": list(weight.shape), "data_offsets": [at, end]}
        total += weight.num_bytes
        at = end + -end % WEIGHTS_ALIGN_BYTES
        if at > end:
            header[f".pad{len(header)}"] = {"dtype": "U8", "shape": [at - end], "data_offsets": [end, at]}
    return header, total


@contextmanager
def making(name: str, weight: object) -> Iterator[None]:
    """Around the making of a weight from its recipe. Raises: CheckpointError: the checkpoint lacks what it needs."""
    try:
        yield
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"weight {name} cannot be made from {weight}: {error}; is the checkpoint whole?"
        ) from error


def checked(name: str, weight: Weight, tensor: Tensor, read: Read) -> Tensor:
    """A weight's tensor as it is written, contiguous and flat.

    Raises: CheckpointError: it has another shape or dtype, or holds NaN or infinity.
    """
    if tuple(tensor.shape) != weight.shape or tensor.dtype != weight.dtype:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise CheckpointError(f"weight {name}: expected {weight.dtype} {list(weight.shape)}, got {found}")
    if not _is_finite(tensor) and any(not s.startswith(COMPUTED) for s in weight.sources()):
        raise CheckpointError(_not_finite(name, weight, read))
    return tensor.detach().contiguous().reshape(-1)


def _is_finite(tensor: Tensor) -> bool:
    """Without NaN and infinity. Cost: one pass, no copy."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or not tensor.numel():
        return True
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor))


def _not_finite(name: str, weight: Weight, read: Read) -> str:
    """Which of the checkpoint's tensors is at fault; none where the weight's own dtype is too small for the numbers."""
    bad = next((s for s in weight.sources() if not _is_finite(read(s))), None)
    if bad is None:
        return f"weight {name} = {weight}: its numbers are too large for {weight.dtype}; compile with weights f32"
    return f"tensor {bad} holds NaN or infinity; the checkpoint is damaged: download it again"
