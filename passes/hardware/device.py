"""What one device can do: memory, bandwidth and arithmetic rates, each number with its source."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class Device:
    """Peak figures of one device; the cost model multiplies them by fitted efficiencies.

    Args:
        name: short name, as used in mesh names and mesh files.
        memory_bytes: memory that the driver reports as installed.
        bytes_per_s: peak memory bandwidth.
        flops: dense multiply-add rate in FLOP/s by arithmetic format ("bf16", "fp8", "int8", "fp4"); formats that
            the device does not multiply natively are absent.
        source: where each number was read.
    """

    name: str
    memory_bytes: int
    bytes_per_s: float
    flops: dict[str, float]
    source: str
