"""NVIDIA H200 SXM 141 GB (Hopper, sm_90a)."""

from moec.passes.hardware.device import MIB, Device

H200 = Device(
    name="h200",
    memory_bytes=143771 * MIB,
    bytes_per_s=4800e9,
    flops={"bf16": 989.4e12, "fp8": 1978.9e12, "int8": 1978.9e12},
    source="NVIDIA H200 datasheet, SXM column (dense = half of the sparse figure); memory as the driver reports it",
)
