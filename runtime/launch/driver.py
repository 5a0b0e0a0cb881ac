"""CUDA by the driver's own library: cubins loaded and launched on addresses. Python's standard library alone.

    kernel = CubinKernel.load(Driver(), Path("gate.cubin").read_bytes(), launch)   # launch: CudaSource.launch()
    kernel.start([c_void_p(address), .., c_int(5)], kernel.grid({"n": 5}), None)    # in the order of its parameters

launch/cuda.py does this for torch's tensors; bundles of tuning candidates carry this file and need nothing else.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

from moec.runtime.errors import EngineError
from moec.runtime.expressions import compiled

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
MAP_TYPES = {"bfloat16": 9, "float8_e4m3fn": 0}  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, _UINT8
_SWIZZLE_128, _L2_128 = 3, 2
_MAP_BYTES, _MAP_ALIGN = 128, 64
MIN_DRIVER = 13000  # what machine code of CUDA 13 needs
MAX_GRID = (2147483647, 65535, 65535)


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
        self.version = version.value
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
class CubinKernel:
    """A kernel, loaded until the process ends. launch: symbol, threads, shared_bytes, grid, parameters."""

    driver: Driver
    function: ctypes.c_void_p
    launch: dict[str, Any]

    @classmethod
    def load(cls, driver: Driver, cubin: bytes, launch: dict[str, Any]) -> Self:
        """Raises: CudaError."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        driver.call("cuModuleLoadData", ctypes.byref(module), cubin)
        driver.call("cuModuleGetFunction", ctypes.byref(function), module, launch["symbol"].encode())
        if launch["shared_bytes"]:
            driver.call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, ctypes.c_int(launch["shared_bytes"]))
        if launch.get("cooperative"):
            _check_residence(driver, function, launch)
        return cls(driver, function, launch)

    def grid(self, values: Mapping[str, Any]) -> list[int] | None:
        """The launch grid for values of the integer parameters, None where no block would run.

        Raises: CudaError: it is too large. KeyError: a parameter without a value.
        """
        integers = {p["name"]: int(values[p["name"]]) for p in self.launch["parameters"] if p["kind"] == "int"}
        grid = compiled(tuple(self.launch["grid"]), tuple(integers))(**integers)
        if min(grid) < 1:
            return None
        if any(n > most for n, most in zip(grid, MAX_GRID, strict=True)):
            limits = " x ".join(map(str, MAX_GRID))
            raise CudaError(f"{self.launch['symbol']}: a grid of {grid}, at most {limits}")
        return grid

    def start(self, arguments: Sequence[Any], grid: Sequence[int], stream: ctypes.c_void_p | None) -> None:
        """Launches. arguments: ctypes values in the order of the parameters. Raises: CudaError."""
        pointers = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(a) for a in arguments])
        threads, shared = self.launch["threads"], self.launch["shared_bytes"]
        values = (self.function, *grid, threads, 1, 1, shared, stream, pointers)
        if self.launch.get("cooperative"):  # its blocks wait for each other: the driver refuses more than are resident
            self.driver.call("cuLaunchCooperativeKernel", *values)
        else:
            self.driver.call("cuLaunchKernel", *values, None)


def _check_residence(driver: Driver, function: ctypes.c_void_p, launch: Mapping[str, Any]) -> None:
    """Raises: CudaError: fewer blocks of a kernel than it is launched with are on a multiprocessor at a time."""
    fit, needed = ctypes.c_int(), launch.get("blocks_per_sm", 1)
    size = ctypes.c_size_t(launch["shared_bytes"])
    driver.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(fit), function, launch["threads"], size)
    if fit.value < needed:
        raise CudaError(
            f"{launch['symbol']}: {fit.value} of its blocks fit on a multiprocessor together, its launch has {needed}; "
            "compile the engine again with this driver's compiler, and report it"
        )


def encode_map(
    driver: Driver, address: int, dtype: str, width: int, rows: int, element_bytes: int, box: Mapping[str, Any]
) -> ctypes.Array[ctypes.c_char]:
    """The tensor map of rows x width elements at an address, for loads of boxes of box["columns"] x box["rows"]."""
    memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGN)
    start = -ctypes.addressof(memory) % _MAP_ALIGN
    aligned = (ctypes.c_char * _MAP_BYTES).from_buffer(memory, start)
    driver.call(
        "cuTensorMapEncodeTiled", ctypes.byref(aligned), MAP_TYPES[dtype], 2,
        ctypes.c_void_p(address), (ctypes.c_uint64 * 2)(width, rows),
        (ctypes.c_uint64 * 1)(width * element_bytes), (ctypes.c_uint32 * 2)(box["columns"], box["rows"]),
        (ctypes.c_uint32 * 2)(1, 1), 0, _SWIZZLE_128, _L2_128, 0,
    )  # fmt: skip
    return aligned
