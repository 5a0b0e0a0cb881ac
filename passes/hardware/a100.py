"""NVIDIA A100 SXM4 80 GB (Ampere, sm_80): no fp8 arithmetic."""

from moec.passes.hardware.device import MIB, Device

A100_80G = Device(
    name="a100",
    memory_bytes=81920 * MIB,
    bytes_per_s=2039e9,
    flops={"bf16": 312e12, "int8": 624e12},
    source="NVIDIA A100 datasheet, SXM 80 GB column (dense)",
)
