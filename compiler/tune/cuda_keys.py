"""Keys of the CUDA grouped GEMMs: which problem a result belongs to, wherever it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.compiler.codegen.cuda_toolchain import Compiler
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem
from moec.compiler.kernels.cuda.gemm_space import kernel_sha256
from moec.compiler.tune.record import Key, shape_text

OP = "grouped_gemm"
SIZES = ("E", "F", "H", "K", "S")
"""Routed experts, inner width, hidden size, experts per token, shared experts."""
_DEVICES = (
    ("sm_80", ("A100", "A800")),
    ("sm_89", ("L4", "L40", "L40S", "L20", "4090", "RTX 6000 Ada")),
    ("sm_90a", ("H100", "H200", "H800", "H20", "GH200")),
    ("sm_100a", ("B200", "GB200")),
    ("sm_120a", ("5090", "RTX PRO 6000")),
)


def gemm_problem(sizes: Mapping[str, Any], mode: str, part_dtype: str = "float32") -> GemmProblem:
    """The GEMM of a layer in bfloat16 with a SiLU gate. sizes: of SIZES."""
    depth, columns = (sizes["H"], sizes["F"]) if mode == "gate_up" else (sizes["F"], sizes["H"])
    stacked, slots = sizes["E"] + sizes["S"], sizes["K"] + sizes["S"]
    return GemmProblem(mode, depth, columns, stacked, slots, part_dtype=part_dtype)


def gemm_key(
    problem: GemmProblem, sizes: Mapping[str, Any], tokens: int, routing: str, device: str, toolchain: str
) -> Key:
    """device: as the driver names it, "NVIDIA H200". toolchain: of the compiler that made the cubins."""
    shape = shape_text({name: sizes[name] for name in SIZES} | {"mode": problem.mode})
    return Key(kernel_sha256(), OP, shape, tokens, problem.dtype, routing, device, toolchain)


def toolchain(compiler: Compiler) -> str:
    """A compiler as keys name it: "nvcc 13.0, V13.0.88", without what nvcc says of its own build."""
    return compiler.version.strip().splitlines()[0]


def arch_of_device(name: str) -> str | None:
    """The architecture that a device of that name needs kernels for, None: unknown."""
    words = name.replace("_", " ").replace("-", " ")
    for arch, devices in _DEVICES:
        if any(f" {device} " in f" {words} " for device in devices):
            return arch
    return None
