"""NVIDIA RTX PRO 6000 Blackwell Server Edition 96 GB (sm_120, PCIe)."""

from moec.passes.hardware.device import MIB, Device

RTX6000PRO = Device(
    name="rtx6000pro",
    memory_bytes=97887 * MIB,
    bytes_per_s=1597e9,
    flops={"bf16": 500e12, "fp8": 1000e12, "int8": 1000e12, "fp4": 2000e12},
    source="NVIDIA RTX PRO 6000 Blackwell Server Edition datasheet (dense = half of the sparse figure)",
)
