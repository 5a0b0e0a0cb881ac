"""The GPU that an engine runs on: what is checked before anything is loaded, and how weights and kernels get there.

Needs torch with CUDA and the driver's library; `Device` is what the runtime asks of one, so that a test can put another
in its place (compiler/codegen/emulator/device.py runs the kernels on the CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from moec.runtime.errors import DeviceMemoryError, FormatError, TargetError
from moec.runtime.launch.cuda import Kernel
from moec.runtime.launch.driver import Driver, check_device

Result = TypeVar("Result")


class Device(Protocol):
    """A GPU. torch_device: where its tensors are.  capability: (major, minor).  driver: its library."""

    torch_device: torch.device
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    driver: Driver

    def memory_bytes(self) -> tuple[int, int]:
        """Free and in all."""

    def stream(self) -> int:
        """The stream that launches go to now, as the driver knows it."""

    def synchronise(self) -> None:
        """Waits until all that was launched is done."""

    def capture(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Captures what run() launches -> what launches it again, and the result, which every replay fills anew."""


class CudaDevice:
    """A GPU of this machine by torch's name for it: "cuda", "cuda:1".

    Raises: TargetError: torch finds no such device.  CudaError: no driver, or one that is too old.
    """

    def __init__(self, name: str = "cuda") -> None:
        if not torch.cuda.is_available():
            what = "was built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
            raise TargetError(f"the engine is for a GPU, and torch {torch.__version__} {what}; run it on a GPU machine")
        count, device = torch.cuda.device_count(), torch.device(name)
        index = torch.cuda.current_device() if device.index is None else device.index
        if device.type != "cuda" or index >= count:
            known = ", ".join(f"cuda:{i}" for i in range(count))
            raise TargetError(f"there is no device {name!r} for a GPU engine; this machine has {known}")
        self.driver = Driver()
        self.torch_device = torch.device("cuda", index)
        torch.zeros(1, device=self.torch_device)  # makes the device's context, which modules are loaded into
        torch.cuda.set_device(self.torch_device)
        properties = torch.cuda.get_device_properties(index)
        self.name, self.capability = properties.name, (properties.major, properties.minor)
        self.multiprocessors: int = properties.multi_processor_count
        self._pool: Any = None

    def memory_bytes(self) -> tuple[int, int]:
        """See Device; what torch keeps for reuse counts as free."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        kept = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return free + kept, total

    def stream(self) -> int:
        """See Device."""
        return torch.cuda.current_stream(self.torch_device).cuda_stream

    def synchronise(self) -> None:
        """See Device."""
        torch.cuda.synchronize(self.torch_device)

    def capture(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """See Device. All graphs share one pool of memory: they are replayed one after the other."""
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        return graph.replay, result


def open_device(manifest: Mapping[str, Any], given: Device | str | None) -> Device:
    """The device for an engine, checked against what the engine is for. given: one, its name, or None: torch's current.

    Raises: TargetError, CudaError: there is none, its driver is too old, or the kernels are for another architecture.
    """
    device: Device = CudaDevice(given or "cuda") if given is None or isinstance(given, str) else given
    check_device(manifest["target"]["level"], device.capability)
    return device


def load_kernels(directory: Path, table: Any, device: Device) -> dict[str, Kernel]:
    """symbol -> kernel, of the "kernels" in program.json. Raises: FormatError.  CudaError: the driver refuses one."""
    kernels = {}
    try:
        files = {symbol: (directory / entry["file"], entry["launch"]) for symbol, entry in table.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise FormatError(f"program.json: its kernels cannot be read ({error!r}); compile the engine again") from error
    for symbol, (path, launch) in files.items():
        kernel = Kernel.load(device.driver, path.read_bytes(), launch)
        kernel.device, kernel.stream = device.torch_device.type, device.stream
        kernels[symbol] = kernel
    return kernels


def to_device(weights: Mapping[str, Tensor], device: Device) -> dict[str, Tensor]:
    """The weights copied to the device, one after the other.

    Raises: DeviceMemoryError: they do not fit; what was copied is given back.
    """
    needed = sum(t.numel() * t.element_size() for t in weights.values())
    moved: dict[str, Tensor] = {}
    try:
        for name, tensor in weights.items():
            moved[name] = tensor.to(device.torch_device)
        return moved
    except torch.OutOfMemoryError:
        moved.clear()
    raise DeviceMemoryError(
        f"the engine has {gib(needed)} of weights, {free_memory(device)}; compile it for more ranks, or with smaller "
        "weights"
    )


def free_memory(device: Device) -> str:
    """What is free of a device's memory, in words."""
    free, total = device.memory_bytes()
    return f"{device.name} has {gib(free)} free of {gib(total)}"


def gib(num_bytes: float) -> str:
    """A number of bytes as messages give it: "1.50 GiB"."""
    return f"{num_bytes / 2**30:.2f} GiB"
