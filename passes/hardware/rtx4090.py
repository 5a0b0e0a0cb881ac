"""NVIDIA GeForce RTX 4090 (Ada, sm_89)."""

from moec.passes.hardware.device import MIB, Device

RTX4090 = Device(
    name="rtx4090",
    memory_bytes=24564 * MIB,
    bytes_per_s=1008e9,
    flops={"bf16": 165.2e12, "fp8": 330.3e12, "int8": 660.6e12},
    source="NVIDIA Ada architecture whitepaper v2.1, appendix A (dense, fp32 accumulation); memory as the driver "
    "reports it",
)
