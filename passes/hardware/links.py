"""Link classes that the named meshes use; bytes_per_s is per device and direction."""

from moec.passes.hardware.mesh import Link

NVLINK4 = Link("nvlink", 12e-6, 450e9, "NVIDIA H100 datasheet: 900 GB/s both directions; NCCL small all-reduce 12 us")
NVLINK3 = Link("nvlink", 12e-6, 300e9, "NVIDIA A100 datasheet: 600 GB/s both directions; latency as NVLink 4")
NVLINK5 = Link("nvlink", 12e-6, 900e9, "NVIDIA B200 datasheet: 1800 GB/s both directions; latency as NVLink 4")
PCIE4_X16 = Link(
    "pcie",
    42e-6,
    31.5e9,
    "PCI Express 4.0 x16: 16 GT/s x 16 lanes, 128b/130b; 8-byte all-reduce over 8 RTX 4090 42 us (NVIDIA/nccl "
    "issue 1530)",
)
PCIE5_X16 = Link("pcie", 42e-6, 63e9, "PCI Express 5.0 x16: 32 GT/s x 16 lanes, 128b/130b; latency as PCIe 4")
INFINIBAND_NDR = Link(
    "network",
    60e-6,
    50e9,
    "InfiniBand NDR, one 400 Gb/s port per device; latency: order of two NVLink and one network hop",
)
SHARED_MEMORY = Link(
    "shared-memory",
    5e-3,
    5e9,
    "processes of one machine over gloo: 5 to 60 ms per small collective on two loaded cores",
)
