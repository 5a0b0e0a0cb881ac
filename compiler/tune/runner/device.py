"""A GPU by the driver's library: memory, fills, events. Python's standard library alone."""

from __future__ import annotations

import array
import ctypes
from collections.abc import Sequence
from typing import Any

from moec.runtime.launch.driver import CudaError, Driver, check_device

_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _MULTIPROCESSORS, _CLOCK_KHZ, _MEMORY_CLOCK_KHZ = 75, 76, 16, 13, 36
FLUSH_BYTES = 256 << 20  # more than any L2 cache


class Device:
    """The first GPU, its primary context current in this thread. Raises: CudaError: none, or another architecture."""

    def __init__(self, arch: str, driver: Driver | None = None) -> None:
        self.driver = driver or Driver()
        self.driver.call("cuInit", 0)
        self._device, context = ctypes.c_int(), ctypes.c_void_p()
        self.driver.call("cuDeviceGet", ctypes.byref(self._device), 0)
        check_device(arch, (self._attribute(_CAPABILITY_MAJOR), self._attribute(_CAPABILITY_MINOR)))
        self.driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self.driver.call("cuCtxSetCurrent", context)
        name = ctypes.create_string_buffer(256)
        self.driver.call("cuDeviceGetName", name, len(name), self._device)
        self.name, self.multiprocessors = name.value.decode(), self._attribute(_MULTIPROCESSORS)
        self._start, self._end = self._event(), self._event()
        self._flush = 0

    def facts(self) -> dict[str, Any]:
        """What a result is kept under and beside."""
        clocks = {"clock_khz": self._attribute(_CLOCK_KHZ), "memory_clock_khz": self._attribute(_MEMORY_CLOCK_KHZ)}
        return {"device": self.name, "driver": self.driver.version, "multiprocessors": self.multiprocessors} | clocks

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self.driver.call("cuDeviceGetAttribute", ctypes.byref(value), number, self._device)
        return value.value

    def _event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        self.driver.call("cuEventCreate", ctypes.byref(event), 0)
        return event

    def allocate(self, num_bytes: int) -> int:
        """The address of new memory, which the process keeps until it ends. Raises: CudaError: there is not so much."""
        address = ctypes.c_uint64()
        self.driver.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(num_bytes, 16)))
        return address.value

    def upload(self, values: array.array[Any]) -> int:
        """New memory that holds an array."""
        address = self.allocate(len(values) * values.itemsize)
        self.write(address, values)
        return address

    def write(self, address: int, values: array.array[Any]) -> None:
        """Copies an array to an address of the device. Raises: CudaError."""
        source, size = values.buffer_info()[0], len(values) * values.itemsize
        self.driver.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.c_void_p(source), ctypes.c_size_t(size))

    def repeat(self, block: array.array[Any], num_elements: int) -> int:
        """New memory of num_elements that repeats a block."""
        address = self.allocate(max(num_elements, len(block)) * block.itemsize)
        self.write(address, block)
        done = len(block)
        while done < num_elements:
            part = min(done, num_elements - done)
            to, size = ctypes.c_uint64(address + done * block.itemsize), ctypes.c_size_t(part * block.itemsize)
            self.driver.call("cuMemcpyDtoD_v2", to, ctypes.c_uint64(address), size)
            done += part
        return address

    def integers(self, values: Sequence[int]) -> int:
        """New memory of int32."""
        return self.upload(array.array("i", values))

    def fill(self, address: int, num_bytes: int, word: int) -> None:
        """Sets whole words of 32 bits."""
        count = ctypes.c_size_t(num_bytes // 4)
        self.driver.call("cuMemsetD32_v2", ctypes.c_uint64(address), ctypes.c_uint(word), count)

    def read_bf16(self, address: int, index: int) -> int:
        """The bits of one element."""
        value = ctypes.c_uint16()
        source = ctypes.c_uint64(address + 2 * index)
        self.driver.call("cuMemcpyDtoH_v2", ctypes.byref(value), source, ctypes.c_size_t(2))
        return value.value

    def wait(self) -> None:
        """Waits until the device has done all that was launched. Raises: CudaError: a launch failed."""
        self.driver.call("cuCtxSynchronize")

    def time_us(self, step: Any) -> float:
        """One call of step on empty caches, by events. Raises: CudaError: it failed."""
        if not self._flush:
            self._flush = self.allocate(FLUSH_BYTES)
        self.fill(self._flush, FLUSH_BYTES, 0)
        self.driver.call("cuEventRecord", self._start, None)
        step()
        self.driver.call("cuEventRecord", self._end, None)
        self.driver.call("cuEventSynchronize", self._end)
        passed_ms = ctypes.c_float()
        self.driver.call("cuEventElapsedTime", ctypes.byref(passed_ms), self._start, self._end)
        return passed_ms.value * 1e3


__all__ = ["CudaError", "Device"]
