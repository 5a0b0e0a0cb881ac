"""NVIDIA B200 SXM 180 GB (Blackwell, sm_100a)."""

from moec.passes.hardware.device import MIB, Device

B200 = Device(
    name="b200",
    memory_bytes=183359 * MIB,
    bytes_per_s=8000e9,
    flops={"bf16": 2250e12, "fp8": 4500e12, "int8": 4500e12, "fp4": 9000e12},
    source="NVIDIA DGX B200 datasheet, one eighth of the system figures (dense); memory as the driver reports it",
)
