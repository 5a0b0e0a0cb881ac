"""A GPU that is not there: the runtime's device and driver, with every launch run by the emulator on the CPU.

    built = build_emulated(sources, cache_dir)        # in the place of codegen.cuda.build_cubins
    engine = moec.load(folder, device=EmulatedDevice("sm_90a"))

An engine whose kernels were built so has libraries for the CPU where its cubins would be. The runtime loads, checks
and launches them as it would on a GPU: arguments, grids, tensor maps and memory of a program meet the kernels' code.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from moec.compiler.codegen.cuda import BuiltCubin, CudaSource
from moec.compiler.codegen.emulator.emulator import Emulated, EmulationError, TensorMap
from moec.runtime.launch.driver import Driver

Result = TypeVar("Result")
INVALID_VALUE = 1


def build_emulated(sources: Sequence[CudaSource], cache_dir: Path) -> list[BuiltCubin]:
    """The kernels compiled for the CPU. Raises: EmulationError: no C++ compiler, or it failed."""
    paths = [Path(Emulated.build(source, cache_dir).library._name) for source in sources]
    keys = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    return [BuiltCubin(s, path, key, False) for s, path, key in zip(sources, paths, keys, strict=True)]


class EmulatedLibrary:
    """The functions of libcuda that runtime/launch/driver.py calls. launches: (symbol, grid) of each, in order.

    lazy, seed: as Emulated.run has them.  fails: names of calls that return an error.  resident: blocks that it claims
    are on a multiprocessor together.
    """

    def __init__(
        self, version: int = 13000, lazy: bool = True, seed: int = 1, fails: Sequence[str] = (), resident: int = 2
    ) -> None:
        self.version, self.lazy, self.seed, self.fails = version, lazy, seed, frozenset(fails)
        self.resident = resident
        self.launches: list[tuple[str, tuple[int, ...]]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="moec-emulated-")
        self._modules: dict[int, ctypes.CDLL] = {}
        self._functions: dict[int, tuple[ctypes.CDLL, str]] = {}
        self._numbers = itertools.count(1)

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return self._code("cuDriverGetVersion")

    def cuGetErrorName(self, code: int, text: Any) -> int:
        text._obj.value = b"CUDA_ERROR_INVALID_VALUE"
        return 0

    def cuModuleLoadData(self, module: Any, data: bytes) -> int:
        """data: the library that build_emulated made in the place of a cubin."""
        number = module._obj.value = next(self._numbers)
        path = Path(self._folder.name) / f"{number}.so"
        path.write_bytes(data)
        if not self._code("cuModuleLoadData"):
            self._modules[number] = ctypes.CDLL(str(path))
        return self._code("cuModuleLoadData")

    def cuModuleGetFunction(self, function: Any, module: Any, symbol: bytes) -> int:
        number = function._obj.value = next(self._numbers)
        self._functions[number] = (self._modules[module.value], symbol.decode())
        return self._code("cuModuleGetFunction")

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: Any) -> int:
        return self._code("cuFuncSetAttribute")

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, fit: Any, function: Any, threads: int, shared: Any) -> int:
        fit._obj.value = self.resident
        return self._code("cuOccupancyMaxActiveBlocksPerMultiprocessor")

    def cuTensorMapEncodeTiled(
        self, tensor_map: Any, dtype: int, rank: int, address: Any, sizes: Any, pitch: Any, box: Any, *rest: Any
    ) -> int:
        """The emulator's form of a tensor map, in the place of the driver's."""
        columns, rows = sizes
        made = TensorMap(address.value, columns, rows, pitch[0], box[0], box[1], pitch[0] // columns)
        ctypes.memmove(tensor_map._obj, ctypes.byref(made), ctypes.sizeof(made))
        return self._code("cuTensorMapEncodeTiled")

    def cuLaunchKernel(
        self, function: Any, x: int, y: int, z: int, threads: int, threads_y: int, threads_z: int, shared: int,
        stream: Any, arguments: Any, extra: Any,
    ) -> int:  # fmt: skip
        """Runs the whole grid. Raises: EmulationError: a deadlock, an access outside of shared memory."""
        return self._run(function, (x, y, z), threads, shared, arguments, wave=1)

    def cuLaunchCooperativeKernel(
        self, function: Any, x: int, y: int, z: int, threads: int, threads_y: int, threads_z: int, shared: int,
        stream: Any, arguments: Any,
    ) -> int:  # fmt: skip
        """As cuLaunchKernel, all blocks together."""
        return self._run(function, (x, y, z), threads, shared, arguments, wave=0)

    def _run(
        self, function: Any, grid: tuple[int, int, int], threads: int, shared: int, arguments: Any, wave: int
    ) -> int:
        library, symbol = self._functions[function.value]
        self.launches.append((symbol, grid))
        launch = library.moec_emulate
        launch.restype = ctypes.c_char_p
        message = launch(arguments, (ctypes.c_int * 3)(*grid), threads, shared, int(self.lazy), self.seed, wave)
        if message:
            raise EmulationError(f"{symbol}: {message.decode()}")
        return self._code("cuLaunchKernel")

    def _code(self, name: str) -> int:
        return INVALID_VALUE if name in self.fails else 0


class EmulatedDevice:
    """A runtime.launch.cuda_device.Device over an EmulatedLibrary. memory: bytes it claims to have, free and all."""

    def __init__(
        self, arch: str, library: EmulatedLibrary | None = None, memory: tuple[int, int] = (3 << 30, 4 << 30)
    ) -> None:
        number = arch.removeprefix("sm_").rstrip("a")
        self.torch_device, self.name = torch.device("cpu"), f"emulated {arch}"
        self.capability = (int(number[:-1]), int(number[-1]))
        self.multiprocessors = 3
        self.library = library or EmulatedLibrary()
        self.driver, self.memory, self.captured = Driver(self.library), memory, 0

    def memory_bytes(self) -> tuple[int, int]:
        """(free, all), as it was told to claim."""
        return self.memory

    def stream(self) -> int:
        """0, the only one: launches have ended when they return."""
        return 0

    def synchronise(self) -> None:
        """Every launch is done when it returns."""

    def capture(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """A replay runs the step again and brings its results to where the first ones are."""
        result, self.captured = run(), self.captured + 1

        def replay() -> None:
            with torch.inference_mode():
                for old, new in zip(result, run(), strict=True):  # type: ignore[call-overload]
                    old.copy_(new)

        return replay, result
