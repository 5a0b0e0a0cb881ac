"""The grouped GEMMs' tuning space: every value that a tile may have, what fits, and what is used without tuning.

A configuration is flat and spells a tile: {"kernel": "gemm_mma", "rows": 16, ..} or {"kernel": "gemm_wgmma", "columns":
128, "stages": 4}; for down also "part_dtype", the type of its partial sums.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moec.compiler.codegen.cuda_archs import Architecture
from moec.compiler.kernels.cuda import gemm_codes, gemm_mma, gemm_wgmma
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem, Tile
from moec.compiler.kernels.cuda.gemm_wgmma import WgmmaTile
from moec.compiler.kernels.cuda.kernel import CudaKernel

Config = dict[str, int | str | bool]

SPACE: dict[str, dict[str, tuple[int, ...]]] = {
    "gemm_mma": {
        "rows": (16, 32, 64, 128),
        "columns": (32, 64, 128, 256),
        "stages": (2, 3, 4, 5),
        "warps_m": (1, 2, 4),
        "warps_n": (1, 2, 4),
        "splits": (1, 2, 4),
    },
    "gemm_wgmma": {"columns": (64, 96, 128, 192, 256), "stages": (3, 4, 5, 6)},
}
PART_DTYPES = ("float32", "bfloat16")
MAX_ACCUMULATORS = 160  # registers of a thread for sums; with more the rest spills (255 is all that a thread has)
_SOURCES = (
    "activation.py", "combine.py", "emit.py", "gemm_codes.py", "gemm_mma.py", "gemm_operands.py", "gemm_problem.py",
    "gemm_wgmma.py", "rows.py",
)  # fmt: skip


def configs(problem: GemmProblem) -> Iterator[Config]:
    """Every point of the space, fitting or not, in one order."""
    parts: tuple[Config, ...] = ({},) if problem.mode == "gate_up" else tuple({"part_dtype": p} for p in PART_DTYPES)
    for kernel, axes in SPACE.items():
        for values in itertools.product(*axes.values()):
            for part in parts:
                yield {"kernel": kernel, **dict(zip(axes, values, strict=True)), **part}


def config_of(tile: Tile | WgmmaTile, problem: GemmProblem) -> Config:
    """The configuration that a tile is on a problem."""
    kernel: Config = {"kernel": "gemm_mma" if isinstance(tile, Tile) else "gemm_wgmma"}
    part: Config = {"part_dtype": problem.part_dtype} if problem.mode == "down" else {}
    return kernel | dataclasses.asdict(tile) | part


def tile_of(config: Mapping[str, Any]) -> Tile | WgmmaTile:
    """The tile of a configuration. Raises: ValueError: it is none of this space."""
    values = {name: value for name, value in config.items() if name not in ("kernel", "part_dtype")}
    kernel = config.get("kernel")
    if kernel not in SPACE or values.keys() != SPACE[kernel].keys() or any(type(v) is not int for v in values.values()):
        raise ValueError(f"{dict(config)} is no configuration of a CUDA grouped GEMM")
    return Tile(**values) if kernel == "gemm_mma" else WgmmaTile(**values)


def with_part(problem: GemmProblem, config: Mapping[str, Any]) -> GemmProblem:
    """The problem with the partial sums of a configuration."""
    return dataclasses.replace(problem, part_dtype=config.get("part_dtype", problem.part_dtype))


def refusal(config: Mapping[str, Any], problem: GemmProblem, arch: Architecture) -> str | None:
    """Why the configuration does not do the problem on the architecture, or None."""
    tile = tile_of(config)
    if reason := tile.refusal(with_part(problem, config), arch):
        return reason
    if isinstance(tile, WgmmaTile):
        return None
    if tile.splits > 1 and config.get("part_dtype") == "bfloat16":
        return "split sums in bfloat16: they are rounded before they are whole"
    sums = tile.rows * tile.columns // tile.threads
    if sums > MAX_ACCUMULATORS:
        return f"{sums} sums in each thread, at most {MAX_ACCUMULATORS} leave it enough registers"
    return None


TENSOR = {("mma", "bfloat16"): "HMMA", ("mma", "float8_e4m3fn"): "QMMA"}
TENSOR |= {("wgmma", "bfloat16"): "HGMMA", ("wgmma", "float8_e4m3fn"): "QGMMA"}


def gemm_kernel(problem: GemmProblem, tile: Tile | WgmmaTile, arch: str) -> CudaKernel:
    """The GEMM as a kernel of the catalogue; ask tile.refusal first."""
    if isinstance(tile, Tile):
        build = functools.partial((gemm_codes if problem.code_bits else gemm_mma).build, problem, tile)
        return CudaKernel(problem.mode, arch, build, tensor=TENSOR["mma", problem.dtype])
    build = functools.partial(gemm_wgmma.build, problem, tile)
    return CudaKernel(problem.mode, arch, build, tile.boxes(problem), tensor=TENSOR["wgmma", problem.dtype])


@functools.cache
def kernel_sha256() -> str:
    """Of the sources that decide what a configuration's machine code is, its helpers before and after included."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(f"{name}\0".encode() + (Path(__file__).parent / name).read_bytes() + b"\0")
    return digest.hexdigest()
