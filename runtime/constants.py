"""Constants of a program, from the form that JSON holds (see program.py) to the objects that torch takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moec.runtime.errors import FormatError

CPU = torch.device("cpu")
DEVICES: Mapping[str, torch.device] = {"cpu": CPU}


def torch_dtype(name: str) -> torch.dtype:
    """Raises: FormatError: torch has no such dtype."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise FormatError(f"program.json: {name!r} is no dtype")
    return dtype


def decode_constant(a: Any, devices: Mapping[str, torch.device] = DEVICES) -> Any:
    """A constant argument as the object that torch takes. devices: what a device's name stands for.

    Raises: FormatError: no kind of runtime/program.py.
    """
    if isinstance(a, float | str):
        return a
    if isinstance(a, dict) and len(a) == 1:
        ((kind, name),) = a.items()
        if kind == "dtype":
            return torch_dtype(name)
        if kind == "device" and name in devices:
            return devices[name]
        if kind == "number" and name in ("inf", "-inf", "nan"):
            return float(name)
        if kind == "layout" and name == "strided":
            return torch.strided
        if kind == "memory_format" and name in ("contiguous_format", "preserve_format", "channels_last"):
            return getattr(torch, name)
    raise FormatError(f"program.json: argument {a!r} has no meaning")
