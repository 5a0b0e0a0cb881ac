"""Loads cubins and launches them on torch's current stream: torch and the driver's own library alone.

    kernel = Kernel.load(Driver(), Path("gate.cubin").read_bytes(), launch)    # launch: CudaSource.launch()
    kernel(logits=logits, weights=weights, experts=experts, n=5)              # CUDA tensors, contiguous; numbers

A launch waits for nothing and allocates nothing, so it can be captured in a CUDA graph. Tensor maps are made on the
host for the addresses of the call and kept: replays and repeated calls with the same tensors make none.
"""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import torch
from torch import Tensor

from moec.runtime.errors import EngineError
from moec.runtime.expressions import evaluate

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MAP_TYPES = {torch.bfloat16: 9, torch.float8_e4m3fn: 0}  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, _UINT8
_SWIZZLE_128, _L2_128 = 3, 2
_MAP_BYTES, _MAP_ALIGN = 128, 64
MIN_DRIVER = 13000  # what machine code of CUDA 13 needs


class CudaError(EngineError):
    """The driver refused something, or a launch does not fit its kernel."""


class Driver:
    """The driver's library. Raises: CudaError: there is none, or it is older than MIN_DRIVER."""

    def __init__(self, library: Any = None) -> None:
        if library is None:
            try:
                library = ctypes.CDLL("libcuda.so.1")
            except OSError as error:
                raise CudaError(f"no CUDA driver on this machine ({error}); use an engine for the CPU") from error
        self.library = library
        version = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        if version.value < MIN_DRIVER:
            have, need = (f"{v // 1000}.{v % 1000 // 10}" for v in (version.value, MIN_DRIVER))
            raise CudaError(f"the CUDA driver is for {have}, the kernels need {need}; install a newer driver")

    def call(self, name: str, *arguments: Any) -> None:
        """One call of the driver. Raises: CudaError with its name for the error."""
        code = getattr(self.library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorName(code, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'unknown').decode()} ({code})")


def check_device(arch: str, capability: tuple[int, int]) -> None:
    """Raises: CudaError: kernels for arch do not run on a device of that compute capability."""
    number = arch.removeprefix("sm_").rstrip("a")
    major, minor = int(number[:-1]), int(number[-1])
    runs = capability == (major, minor) if arch.endswith("a") else capability[0] == major and capability[1] >= minor
    if not runs:
        have = f"sm_{capability[0]}{capability[1]}"
        raise CudaError(f"the kernels are for {arch}, the device is {have}; compile with --target cuda:{have}")


@dataclasses.dataclass
class Kernel:
    """A loaded kernel. module keeps its code alive."""

    driver: Driver
    module: ctypes.c_void_p
    function: ctypes.c_void_p
    launch: dict[str, Any]
    maps: dict[tuple[Any, ...], ctypes.Array[ctypes.c_char]] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, driver: Driver, cubin: bytes, launch: dict[str, Any]) -> Kernel:
        """launch: symbol, threads, shared_bytes, grid, parameters. Raises: CudaError."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        driver.call("cuModuleLoadData", ctypes.byref(module), cubin)
        driver.call("cuModuleGetFunction", ctypes.byref(function), module, launch["symbol"].encode())
        if launch["shared_bytes"]:
            driver.call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, ctypes.c_int(launch["shared_bytes"]))
        return cls(driver, module, function, launch)

    def __call__(self, **values: Tensor | int | float) -> None:
        """Launches on torch's current stream; a grid without blocks is no launch. Raises: CudaError, KeyError."""
        symbol, parameters = self.launch["symbol"], self.launch["parameters"]
        integers = {p["name"]: int(values[p["name"]]) for p in parameters if p["kind"] == "int"}
        grid = [evaluate(e, integers) for e in self.launch["grid"]]
        if min(grid) < 1:
            return
        if grid[0] >= 1 << 31 or max(grid[1:]) > 65535:
            raise CudaError(f"{symbol}: a grid of {grid}, at most 2147483647 x 65535 x 65535")
        arguments = [self._argument(p, values) for p in parameters]
        pointers = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(a) for a in arguments])
        threads, shared = self.launch["threads"], self.launch["shared_bytes"]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.driver.call("cuLaunchKernel", self.function, *grid, threads, 1, 1, shared, stream, pointers, None)

    def _argument(self, parameter: dict[str, Any], values: dict[str, Tensor | int | float]) -> Any:
        kind = parameter["kind"]
        if kind == "map":
            return self._map(parameter["box"], values[parameter["box"]["tensor"]])
        value = values[parameter["name"]]
        if kind == "pointer":
            return ctypes.c_void_p(self._checked(parameter["name"], value).data_ptr())
        return ctypes.c_float(float(value)) if kind == "float" else ctypes.c_int(int(value))

    def _checked(self, name: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor) or value.device.type != "cuda" or not value.is_contiguous():
            found = f"a tensor on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise CudaError(f"{self.launch['symbol']}: {name} is {found}, expected a contiguous CUDA tensor")
        return value

    def _map(self, box: dict[str, Any], value: Any) -> ctypes.Array[ctypes.c_char]:
        """The tensor map of a tensor, its last axis against all others."""
        tensor = self._checked(box["tensor"], value)
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype, box["columns"], box["rows"])
        if key not in self.maps:
            self.maps[key] = self._encode(tensor, box)
        return self.maps[key]

    def _encode(self, tensor: Tensor, box: dict[str, Any]) -> ctypes.Array[ctypes.c_char]:
        width, size = tensor.shape[-1], tensor.element_size()
        memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGN)
        start = -ctypes.addressof(memory) % _MAP_ALIGN
        aligned = (ctypes.c_char * _MAP_BYTES).from_buffer(memory, start)
        self.driver.call(
            "cuTensorMapEncodeTiled", ctypes.byref(aligned), _MAP_TYPES[tensor.dtype], 2,
            ctypes.c_void_p(tensor.data_ptr()), (ctypes.c_uint64 * 2)(width, tensor.numel() // width),
            (ctypes.c_uint64 * 1)(width * size), (ctypes.c_uint32 * 2)(box["columns"], box["rows"]),
            (ctypes.c_uint32 * 2)(1, 1), 0, _SWIZZLE_128, _L2_128, 0,
        )  # fmt: skip
        return aligned
