"""Loads cubins and launches them on torch's current stream: torch and the driver's own library alone.

    kernel = Kernel.load(Driver(), Path("gate.cubin").read_bytes(), launch)    # launch: CudaSource.launch()
    kernel(logits=logits, weights=weights, experts=experts, n=5)              # CUDA tensors, contiguous; numbers

A launch waits for nothing and allocates nothing, so it can be captured in a CUDA graph. Tensor maps are made on the
host for the addresses of the call and kept: replays and repeated calls with the same tensors make none.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moec.runtime.launch.driver import CubinKernel, CudaError, Driver, check_device, encode_map

MAX_MAPS = 256
ALIGN_BYTES = 16  # of every tensor: what kernels load at a time


@dataclasses.dataclass
class Kernel(CubinKernel):
    """A loaded kernel that takes tensors by name. device: where they must be.  stream: the one to launch on, now."""

    maps: dict[tuple[Any, ...], ctypes.Array[ctypes.c_char]] = dataclasses.field(default_factory=dict)
    device: str = "cuda"
    stream: Callable[[], int] = dataclasses.field(default=lambda: torch.cuda.current_stream().cuda_stream)

    def ordered(self, names: tuple[str, ...]) -> Callable[..., None]:
        """The kernel as a function of the named arguments in that order. Raises: CudaError: they are not its own."""
        wanted = {p["box"]["tensor"] if p["kind"] == "map" else p["name"] for p in self.launch["parameters"]}
        if wanted != set(names):
            raise CudaError(
                f"{self.launch['symbol']}: a step gives {', '.join(sorted(names))}, the kernel takes "
                f"{', '.join(sorted(wanted))}; compile the engine again"
            )
        return lambda *values: self(**dict(zip(names, values, strict=True)))

    def __call__(self, **values: Tensor | int | float) -> None:
        """Launches on torch's current stream; a grid without blocks is no launch. Raises: CudaError, KeyError."""
        grid = self.grid(values)
        if grid is None:
            return
        arguments = [self._argument(p, values) for p in self.launch["parameters"]]
        self.start(arguments, grid, ctypes.c_void_p(self.stream()))

    def _argument(self, parameter: dict[str, Any], values: dict[str, Tensor | int | float]) -> Any:
        kind = parameter["kind"]
        if kind == "map":
            return self._map(parameter["box"], values[parameter["box"]["tensor"]])
        value = values[parameter["name"]]
        if kind == "pointer":
            return ctypes.c_void_p(self._checked(parameter["name"], value).data_ptr())
        return ctypes.c_float(float(value)) if kind == "float" else ctypes.c_int(int(value))

    def _checked(self, name: str, value: Any) -> Tensor:
        strided = any(p["name"] == f"{name}_stride" for p in self.launch["parameters"])
        if not isinstance(value, Tensor) or value.device.type != self.device or not (strided or value.is_contiguous()):
            found = f"a tensor on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise CudaError(f"{self.launch['symbol']}: {name} is {found}, expected a contiguous CUDA tensor")
        if value.data_ptr() % ALIGN_BYTES:
            raise CudaError(f"{self.launch['symbol']}: {name} starts at no multiple of {ALIGN_BYTES} bytes")
        return value

    def _map(self, box: dict[str, Any], value: Any) -> ctypes.Array[ctypes.c_char]:
        """The tensor map of a tensor, its last axis against all others."""
        tensor = self._checked(box["tensor"], value)
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype, box["columns"], box["rows"])
        if key not in self.maps:
            width, dtype = tensor.shape[-1], str(tensor.dtype).removeprefix("torch.")
            rows = tensor.numel() // width
            while len(self.maps) >= MAX_MAPS:  # a launch keeps a copy, so the oldest may go
                del self.maps[next(iter(self.maps))]
            self.maps[key] = encode_map(self.driver, tensor.data_ptr(), dtype, width, rows, tensor.element_size(), box)
        return self.maps[key]


__all__ = ["CudaError", "Driver", "Kernel", "check_device"]
