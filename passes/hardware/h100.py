"""NVIDIA H100 SXM5 80 GB (Hopper, sm_90a)."""

from moec.passes.hardware.device import MIB, Device

H100 = Device(
    name="h100",
    memory_bytes=81559 * MIB,
    bytes_per_s=3350e9,
    flops={"bf16": 989.4e12, "fp8": 1978.9e12, "int8": 1978.9e12},
    source="NVIDIA H100 datasheet, SXM column (dense = half of the sparse figure); memory as the driver reports it",
)
