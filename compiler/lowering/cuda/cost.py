"""Predicted time of a step on a GPU: launches, bytes at the device's rate, arithmetic at a part of the peak.

The rates are those of passes/hardware (datasheets). What part of them a kernel reaches is assumed, not measured: the
figures below only order candidates, and a tuning run on the device replaces them (docs/gpu.md).
"""

from __future__ import annotations

from moec.compiler.codegen.cuda_archs import Architecture
from moec.compiler.kernels.spec import Cost
from moec.passes.hardware.a100 import A100_80G
from moec.passes.hardware.b200 import B200
from moec.passes.hardware.device import Device
from moec.passes.hardware.h100 import H100
from moec.passes.hardware.rtx4090 import RTX4090
from moec.passes.hardware.rtx6000pro import RTX6000PRO

DEVICES: dict[str, Device] = {
    "sm_80": A100_80G,
    "sm_89": RTX4090,
    "sm_90a": H100,
    "sm_100a": B200,
    "sm_120a": RTX6000PRO,
}
LAUNCH_US = 2.5  # assumed: one kernel in a graph, from the end of the one before to its own end
LIBRARY_LAUNCH_US = 4.0  # assumed: one of torch's own
SYNCHRONISE_US = 25.0  # assumed: the host reads what the device made and launches again
BARRIER_US = 1.5  # assumed: all blocks of a cooperative launch arrive and go on
WAIT_US = 0.8  # assumed: a warp asks memory for its next values and has them
SLOT_US = 0.03  # assumed: a slot more to sort for a block that compares each with all (moe_decode.py)
CACHE_PART = 2.0  # assumed: the L2 cache's bytes per second over the memory's
MEMORY_PART = 0.8  # assumed: of the datasheet's bytes per second
TENSOR_PART = {"few": 0.2, "many": 0.55, "library": 0.5}
"""Assumed parts of the peak: mma.sync with 16 rows to a block, with 128 rows or wgmma, cuBLAS."""


def kernel_us(arch: Architecture, cost: Cost, launches: int, part: str = "many", dtype: str = "bf16") -> float:
    """Of our kernels. part: key of TENSOR_PART. dtype: key of Device.flops."""
    return LAUNCH_US * launches + work_us(arch, cost, part, dtype)


def library_us(arch: Architecture, cost: Cost, launches: float, synchronises: bool = False) -> float:
    """Of torch's kernels; synchronises: the host waits for a result on the way."""
    waits = SYNCHRONISE_US if synchronises else 0.0
    return LIBRARY_LAUNCH_US * launches + waits + work_us(arch, cost, "library")


def router_us(arch: Architecture, tokens: int, waits: int, num_bytes: int) -> float:
    """Logits by warps that go over a row of x and of the router together (gate_linear.py).

    waits: of a warp for memory.  num_bytes: of the router; every token reads it, from the L2 cache after the first.
    """
    device = DEVICES[arch.name]
    reading = tokens * num_bytes / (device.bytes_per_s * CACHE_PART) * 1e6
    return max(WAIT_US * waits, reading, work_us(arch, Cost(num_bytes, 0), "few"))


def work_us(arch: Architecture, cost: Cost, part: str, dtype: str = "bf16") -> float:
    """Reading and arithmetic, overlapped."""
    device = DEVICES[arch.name]
    flops = device.flops.get(dtype, device.flops["bf16"]) * TENSOR_PART[part]
    return max(cost.num_bytes / (device.bytes_per_s * MEMORY_PART), cost.num_flops / flops) * 1e6
