"""A two-core Sapphire Rapids class virtual machine, the one that the project is built and measured on."""

from moec.passes.hardware.device import GIB, Device

CPU_AMX_2CORE = Device(
    name="cpu",
    memory_bytes=23 * GIB,
    bytes_per_s=14.4e9,
    flops={"bf16": 3.7e12, "int8": 7.5e12},
    source="measured here: a two-thread f32 sum over 3.2 GB reads 14.4 GB/s; L1-resident AMX bf16 GEMM 1.88 TFLOP/s "
    "per core "
    "(int8 taken as twice that, from the instruction's width)",
)
