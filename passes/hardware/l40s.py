"""NVIDIA L40S (Ada, sm_89, PCIe)."""

from moec.passes.hardware.device import MIB, Device

L40S = Device(
    name="l40s",
    memory_bytes=46068 * MIB,
    bytes_per_s=864e9,
    flops={"bf16": 362.05e12, "fp8": 733e12, "int8": 733e12},
    source="NVIDIA L40S datasheet (dense); memory as the driver reports it with ECC",
)
