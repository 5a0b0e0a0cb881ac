"""Tensors that lie in a file beside the ONNX file: mapped, and never from anywhere else.

A location is a relative path below the ONNX file's folder. Each folder on the way and the file itself must be what they
seem: a link of either kind, "..", and an absolute path are refused, since a downloaded file could name any file of the
machine by them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from moec.compiler.errors import CheckpointError


def external_tensor(
    folder: Path, entries: Mapping[str, str], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """A tensor of external data, mapped copy on write: nothing is read before its pages are.

    Args: folder: of the ONNX file.  entries: the tensor's external_data keys: location, offset, length.
          name, shape, dtype: what the ONNX file says about the tensor.
    Raises: CheckpointError: the location leaves the folder or is a link, or the file is missing or too short.
    """
    where = f"external data of {name}"
    num_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    offset, length = _number(entries, "offset", 0, where), _number(entries, "length", num_bytes, where)
    if length != num_bytes:
        raise CheckpointError(f"{where}: {list(shape)} {dtype} takes {num_bytes} bytes, the file says {length}")
    location = entries.get("location", "")
    descriptor = _open(folder, location, where)
    try:
        size = os.fstat(descriptor).st_size
        if offset + length > size:
            raise CheckpointError(
                f"{where}: {location} has {size} bytes, the tensor ends at {offset + length}; "
                "it is incomplete: fetch it again"
            )
        if not length:
            return torch.empty(shape, dtype=dtype)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            raw = np.memmap(file, np.uint8, "c", offset, (length,))
    finally:
        os.close(descriptor)
    flat = torch.from_numpy(raw)
    if raw.ctypes.data % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).reshape(shape)


def _number(entries: Mapping[str, str], key: str, default: int, where: str) -> int:
    text = entries.get(key, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) >= 1 << 62:
        raise CheckpointError(f"{where}: {key} is {text!r}; expected a number of bytes")
    return int(text)


def _open(folder: Path, location: str, where: str) -> int:
    """A descriptor of the file, reached from the folder step by step without following a link."""
    path = PurePosixPath(location)
    wrong = not location or "\0" in location or "\\" in location or ":" in location or path.is_absolute()
    if wrong or not path.parts or ".." in path.parts:
        raise CheckpointError(f"{where}: location {location!r} is no path inside the folder of the ONNX file")
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for i, part in enumerate(path.parts):
            last = i + 1 == len(path.parts)
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_NONBLOCK if last else os.O_DIRECTORY)
            below = _step(part, flags, at, f"{where}: {location}")
            os.close(at)
            at = below
        found = os.fstat(at)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{where}: {location} is no regular file")
        if found.st_nlink != 1:
            raise CheckpointError(f"{where}: {location} is a hard link to a file that has another name too; copy it")
    except BaseException:
        os.close(at)
        raise
    return at


def _step(part: str, flags: int, at: int, where: str) -> int:
    try:
        return os.open(part, flags, dir_fd=at)
    except FileNotFoundError:
        raise CheckpointError(f"{where}: there is no such file; put it beside the ONNX file") from None
    except OSError as error:
        if stat.S_ISLNK(os.stat(part, dir_fd=at, follow_symlinks=False).st_mode):
            raise CheckpointError(f"{where}: {part} is a symbolic link; copy what it points to (cp -L)") from None
        raise CheckpointError(f"{where}: {error.strerror}") from error
