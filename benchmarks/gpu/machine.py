"""Where the benchmark runs: a GPU, or, for a dry run, this machine, with emulated kernels and times without meaning."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from moec.runtime.launch.cuda import Driver, Kernel
from moec.runtime.launch.cuda_device import CudaDevice
from moec.runtime.launch.driver import check_device

FLUSH_BYTES = 256 << 20  # more than any L2 cache: each repetition finds the weights in memory only
COPY_BYTES, MATMUL = 2 << 30, 8192
REPEATS = 15
SMI = {
    "driver": "driver_version",
    "clock_sm": "clocks.sm",
    "clock_sm_max": "clocks.max.sm",
    "clock_memory": "clocks.mem",
}
"""Facts that nvidia-smi knows, and its names for them."""

Step = Callable[[], Any]


class Gpu:
    """The machine's GPU. Raises: TargetError, CudaError: none, an old driver, or another architecture than arch."""

    def __init__(self, arch: str) -> None:
        self.gpu = CudaDevice()
        check_device(arch, self.gpu.capability)
        self.device, self.blocks = "cuda", self.gpu.multiprocessors
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def facts(self) -> dict[str, Any]:
        """What a result depends on; the same names as Dry's."""
        version = self.gpu.driver.version
        cuda = f"{version // 1000}.{version % 1000 // 10}"
        told = {"dry_run": False, "device": self.gpu.name, "multiprocessors": self.blocks, "driver_cuda": cuda}
        return told | _nvidia_smi() | _software()

    def kernel(self, path: Path, launch: Mapping[str, Any]) -> Kernel:
        """A kernel of the bundle."""
        return Kernel.load(self.gpu.driver, path.read_bytes(), dict(launch))

    def time_us(self, step: Step, graph: bool, repeats: int = REPEATS) -> float:
        """Median time of a step in microseconds, caches flushed before each; graph: captured and replayed."""
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        run: Step = self.gpu.capture(step)[0] if graph else step
        times = []
        for _ in range(repeats):
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return statistics.median(times)

    def ceilings(self) -> dict[str, float]:
        """What the device reaches: bytes/s of a copy (read and write counted), FLOP/s of a bf16 matmul."""
        return _ceilings(self, COPY_BYTES, MATMUL)

    def done(self) -> None:
        """Between layers: gives memory back."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Dry:
    """This machine: a bundle of make_bundle.py --emulate, every launch emulated, times of the host's clock."""

    def __init__(self, arch: str) -> None:
        from moec.compiler.codegen.emulator.device import EmulatedLibrary

        self.arch, self.device, self.blocks = arch, "cpu", 3
        self.driver = Driver(EmulatedLibrary())

    def facts(self) -> dict[str, Any]:
        """What is to be known first: that nothing was measured."""
        told = {"dry_run": True, "device": "emulated, on a CPU: times mean nothing", "multiprocessors": self.blocks}
        return told | {"driver_cuda": None} | dict.fromkeys(SMI) | _software()

    def kernel(self, path: Path, launch: Mapping[str, Any]) -> Kernel:
        """A kernel of the bundle."""
        kernel = Kernel.load(self.driver, path.read_bytes(), dict(launch))
        kernel.device, kernel.stream = "cpu", lambda: 0
        return kernel

    def time_us(self, step: Step, graph: bool, repeats: int = 1) -> float:
        """Of one run."""
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e6

    def ceilings(self) -> dict[str, float]:
        """Of small operands."""
        return _ceilings(self, 1 << 20, 64)

    def done(self) -> None:
        """Nothing is kept."""


Machine = Gpu | Dry


def _ceilings(machine: Machine, copy_bytes: int, size: int) -> dict[str, float]:
    source, copy = (torch.empty(copy_bytes, dtype=torch.uint8, device=machine.device) for _ in range(2))
    copy_us = machine.time_us(lambda: copy.copy_(source), graph=False)
    m = torch.randn(size, size, device=machine.device, dtype=torch.bfloat16)
    out = torch.empty_like(m)
    matmul_us = machine.time_us(lambda: torch.mm(m, m, out=out), graph=False)
    return {"copy_bytes_per_s": 2 * copy_bytes / copy_us * 1e6, "matmul_flop_per_s": 2 * size**3 / matmul_us * 1e6}


def _nvidia_smi() -> dict[str, str | None]:
    """The driver's version, the clocks now and the highest; None: it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI.values())}", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(SMI)
    return dict(zip(SMI, (value.strip() for value in told.split(",")), strict=False))


def _software() -> dict[str, Any]:
    try:
        import triton

        version: str | None = triton.__version__
    except ImportError:
        version = None
    return {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": version,
        "python": platform.python_version(),
    }
