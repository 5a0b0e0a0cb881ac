"""Reads a Hugging Face checkpoint directory: headers at once, tensors one by one when asked for."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moec.compiler.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: where it lies (start: of its bytes in the file) and what it is."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The tensors of a directory by name. Nothing but headers is read until `read` is called."""

    def __init__(self, directory: Path, tensors: dict[str, StoredTensor]) -> None:
        self.directory, self.tensors = directory, tensors
        self._open: dict[Path, BinaryIO] = {}

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Reads every shard's header.

        Raises: CheckpointError: a shard is missing, truncated or not safetensors, or two hold the same tensor.
        """
        tensors: dict[str, StoredTensor] = {}
        for file, names in _shards(directory).items():
            found = read_header(file)
            absent = sorted(names - found.keys())
            if absent:
                raise CheckpointError(f"{file}: tensor {absent[0]} is missing, though {INDEX} places it here; {_AGAIN}")
            twice = sorted(tensors.keys() & found.keys())
            if twice:
                raise CheckpointError(
                    f"{directory}: tensor {twice[0]} is stored in both {tensors[twice[0]].file.name} and {file.name}; "
                    "which one is meant cannot be known: remove one, or download the checkpoint again"
                )
            tensors |= found
        return cls(directory, tensors)

    def read(self, name: str) -> Tensor:
        """The tensor of this name, as stored, in memory of its own.

        The file is read and not mapped: touched pages of a mapping stay with the process, in the end all of a model.
        Raises: CheckpointError: there is none, or the file has become shorter.
        """
        stored = self.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{self.directory}: no tensor {name}")
        file = self._open.get(stored.file)
        if file is None:
            file = self._open[stored.file] = stored.file.open("rb", buffering=0)
        data = torch.empty(stored.num_bytes, dtype=torch.uint8)
        left = memoryview(data.numpy())
        file.seek(stored.start)
        while left.nbytes:
            count = file.readinto(left)  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{stored.file}: tensor {name} ends before its last byte; {_AGAIN}")
            left = left[count:]
        return data.view(stored.dtype).reshape(stored.shape)


_AGAIN = "download it again"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises: CheckpointError: it is not one."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got a {type(found).__name__}")
    return found


def _shards(directory: Path) -> dict[Path, set[str]]:
    """Which files to read, and the tensors that the index expects in each."""
    if (directory / INDEX).exists():
        shards: dict[Path, set[str]] = {}
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{directory / INDEX}: weight_map: expected an object of tensors and files; {_AGAIN}")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", "..") or "\\" in file:
                raise CheckpointError(
                    f"{directory / INDEX}: tensor {name}: expected the name of a file in this directory, got {file!r}"
                )
            shards.setdefault(directory / file, set()).add(name)
        absent = sorted(f.name for f in shards if not f.exists())
        if absent:
            raise CheckpointError(
                f"{directory}: shard {absent[0]} is missing ({len(absent)} of {len(shards)} shards are); {_AGAIN}"
            )
        if shards:
            return shards
    if (directory / SINGLE).exists():
        return {directory / SINGLE: set()}
    pickled = any(directory.glob("*.bin"))
    advice = "convert its .bin files to safetensors first" if pickled else "or give a seed for random weights"
    raise CheckpointError(f"{directory}: no weights: expected {SINGLE} or {INDEX}; {advice}")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors that a safetensors file holds. Raises: CheckpointError: truncated, or another format."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{file}: not a whole safetensors file ({size} bytes); {_AGAIN}")
        try:
            header = json.loads(f.read(length))
            entries = {name: e for name, e in header.items() if name != "__metadata__"}
            end = max((e["data_offsets"][1] for e in entries.values()), default=0)
            found = {n: _stored(file, e, 8 + length) for n, e in entries.items()}
            lengths = {n: e["data_offsets"][1] - e["data_offsets"][0] for n, e in entries.items()}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(
                f"{file}: damaged safetensors header ({type(error).__name__} {error}); {_AGAIN}"
            ) from error
    expected = 8 + length + end
    if size != expected:
        raise CheckpointError(f"{file}: truncated or damaged: expected {expected} bytes, got {size}; {_AGAIN}")
    wrong = next((n for n, t in found.items() if lengths[n] != t.num_bytes or t.start < 8 + length), None)
    if wrong is not None:
        t = found[wrong]
        raise CheckpointError(
            f"{file}: tensor {wrong}: {t.dtype} {list(t.shape)} takes {t.num_bytes} bytes, its place has "
            f"{lengths[wrong]}; {_AGAIN}"
        )
    return found


def _stored(file: Path, entry: dict[str, Any], data_start: int) -> StoredTensor:
    shape = tuple(int(n) for n in entry["shape"])
    return StoredTensor(file, data_start + entry["data_offsets"][0], shape, DTYPES[entry["dtype"]])
