"""The kernels of one expert layer on one architecture, for few tokens or for many: which, and with which tiles.

Few tokens ("small"): gate, dispatch, gate_up and down by mma.sync with 16 rows to a block, combine. Many ("large"):
128 rows to a block, by TMA and wgmma on sm_90a (x gathered first), by mma.sync elsewhere. Tiles are defaults that no
measurement has confirmed: the tuner replaces them (docs/gpu.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moec.compiler.codegen.cuda_archs import Architecture, architecture
from moec.compiler.errors import CompileError
from moec.compiler.kernels.cuda import codes, combine, dispatch, gate, gemm_space, gemm_wgmma, rows
from moec.compiler.kernels.cuda.combine import CombineProblem
from moec.compiler.kernels.cuda.dispatch import DispatchProblem
from moec.compiler.kernels.cuda.gemm_problem import ELEMENT_BYTES, GemmProblem, Tile
from moec.compiler.kernels.cuda.gemm_space import gemm_kernel
from moec.compiler.kernels.cuda.gemm_wgmma import WgmmaTile
from moec.compiler.kernels.cuda.kernel import CudaKernel
from moec.compiler.kernels.cuda.rows import RowsProblem
from moec.compiler.kernels.gate.problem import GateProblem


class LayerError(CompileError):
    """No CUDA kernels for an expert layer."""


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """hidden H, inner F, num_experts E (routed), top_k K; gate: GateSpec.encode().

    dtype: as GemmProblem's, or the format of weights that are codes ("int4-g64", "int8": codes.py).
    """

    name: str
    hidden: int
    inner: int
    num_experts: int
    top_k: int
    gate: str
    num_shared: int = 0
    act: str = "silu"
    dtype: str = "bfloat16"

    @property
    def slots_per_token(self) -> int:
        """Routed and shared ones."""
        return self.top_k + self.num_shared

    def gemm(self, mode: str, part_dtype: str) -> GemmProblem:
        """The layer's GEMM of a mode. part_dtype: of what down writes."""
        depth, columns = (self.hidden, self.inner) if mode == "gate_up" else (self.inner, self.hidden)
        stacked = self.num_experts + self.num_shared
        dtype, code_bits, group = self.dtype, 0, 0
        if dtype not in ELEMENT_BYTES:
            dtype = "bfloat16"
            code_bits, group = codes.code_bits_and_group(self.dtype, depth)
        return GemmProblem(
            mode, depth, columns, stacked, self.slots_per_token, self.act, dtype, part_dtype=part_dtype,
            code_bits=code_bits, group=group,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LayerKernels:
    """One way of running a layer. tile_rows: for dispatch. gathers: x goes through the `gather` kernel first."""

    shape: LayerShape
    tile_rows: int
    splits: int
    part_dtype: str
    gathers: bool
    kernels: dict[str, CudaKernel]


def layer_kernels(
    shape: LayerShape, arch_name: str, size: str, configs: Mapping[str, Mapping[str, Any]] | None = None
) -> LayerKernels:
    """The kernels for size "small" or "large".

    configs: of "gate_up" and "down" (gemm_space.py), in the place of the default tiles.
    Raises: ArchitectureError, LayerError: a shape that no tile does, or tiles that do not go together.
    """
    arch = architecture(arch_name)
    large = size == "large"
    part_dtype = configs["down"]["part_dtype"] if configs else "bfloat16" if large else "float32"
    gate_up, down = shape.gemm("gate_up", part_dtype), shape.gemm("down", part_dtype)
    if configs:
        tiles = {p.mode: configured_tile(p, configs[p.mode], arch) for p in (gate_up, down)}
    else:
        tiles = {p.mode: default_tile(p, arch, large) for p in (gate_up, down)}
    first, last = tiles["gate_up"], tiles["down"]
    if tile_rows(first) != tile_rows(last):
        raise LayerError(
            f"gate_up takes {tile_rows(first)} rows to a block, down {tile_rows(last)}: one map serves both"
        )
    gathers = isinstance(first, WgmmaTile)
    fit = 1 if large or configs or isinstance(last, WgmmaTile) else 2
    made = {
        p.mode: dataclasses.replace(gemm_kernel(p, tiles[p.mode], arch.name), blocks_per_sm=fit)
        for p in (gate_up, down)
    }
    splits = last.splits if isinstance(last, Tile) else 1
    made |= _others(shape, arch, tile_rows(last), splits, part_dtype, gathers)
    return LayerKernels(shape, tile_rows(last), splits, part_dtype, gathers, made)


def tile_rows(tile: Tile | WgmmaTile) -> int:
    """Rows of a block."""
    return tile.rows if isinstance(tile, Tile) else gemm_wgmma.ROWS


def configured_tile(problem: GemmProblem, config: Mapping[str, Any], arch: Architecture) -> Tile | WgmmaTile:
    """The tile of a configuration. Raises: LayerError: it does not do the problem."""
    try:
        reason = gemm_space.refusal(config, problem, arch)
    except ValueError as error:
        reason = str(error)
    if reason is not None:
        raise LayerError(f"{problem.mode} with {dict(config)}: {reason}")
    return gemm_space.tile_of(config)


def _others(
    shape: LayerShape, arch: Architecture, tile_rows: int, splits: int, part_dtype: str, gathers: bool
) -> dict[str, CudaKernel]:
    """Everything but the GEMMs."""
    route = DispatchProblem(shape.num_experts, shape.top_k, shape.num_shared, tile_rows)
    sums = CombineProblem(shape.hidden, shape.num_experts, shape.top_k, shape.num_shared, splits, part_dtype)
    fp8 = shape.dtype == "float8_e4m3fn"
    made = {
        "gate": CudaKernel("gate", arch.name, _later(gate.build, GateProblem(shape.gate, shape.num_experts))),
        "place": CudaKernel("place", arch.name, _later(dispatch.build_place, route, True)),
        "count": CudaKernel("count", arch.name, _later(dispatch.build_count, route)),
        "place_chunks": CudaKernel("place_chunks", arch.name, _later(dispatch.build_place, route, False)),
        "combine": CudaKernel("combine", arch.name, _later(combine.build, sums)),
    }
    if gathers or fp8:
        problem = RowsProblem(shape.hidden, shape.slots_per_token if gathers else 0, fp8)
        made["gather"] = CudaKernel("gather", arch.name, _later(rows.build, problem))
    if fp8:
        problem = RowsProblem(shape.inner, 0, True)
        made["quantise_h"] = CudaKernel("quantise_h", arch.name, _later(rows.build, problem))
    return made


def _later(function: object, *arguments: object):  # type: ignore[no-untyped-def]
    return lambda: function(*arguments)  # type: ignore[operator]


def default_tile(problem: GemmProblem, arch: Architecture, large: bool) -> Tile | WgmmaTile:
    """What a GEMM uses without tuning. large: many tokens. Raises: LayerError: no tile does it."""
    by_wgmma = arch.tensor == "wgmma" and (large or problem.dtype == "float8_e4m3fn")  # its mma.sync emulates e4m3
    by_wgmma = by_wgmma and not problem.code_bits  # wgmma reads weights from shared memory alone
    return _wgmma_tile(problem, arch) if by_wgmma else _mma_tile(problem, arch, large)


def _wgmma_tile(problem: GemmProblem, arch: Architecture) -> WgmmaTile:
    widest = 128 if problem.halves == 2 else 256
    reasons = []
    for columns in range(widest, 0, -16):
        for stages in (5, 4):
            tile = WgmmaTile(columns, stages)
            if (reason := tile.refusal(problem, arch)) is None:
                return tile
            reasons.append(reason)
    raise LayerError(f"no wgmma tile does {problem.mode} of {problem.depth} x {problem.columns}: {reasons[-1]}")


def _mma_tile(problem: GemmProblem, arch: Architecture, large: bool) -> Tile:
    """The first tile that does the problem: wide ones first; with few rows, enough blocks to keep memory busy."""
    if large:
        tiles = [Tile(128, 128, 3, 2, 4)] if problem.code_bits else []
        tiles += [Tile(128, 128, 3, 2, 2), Tile(128, 64, 3, 4, 1), Tile(128, 64, 3, 2, 2), Tile(128, 32, 3, 4, 1)]
    else:
        splits = 1 if problem.mode == "gate_up" else min(4, problem.steps)
        tiles = [
            Tile(16, columns, stages, 1, warps, splits)
            for columns, warps in ((128, 4), (64, 2), (32, 1))
            for stages in (5, 4, 3, 2)
        ]
    reasons = []
    for tile in tiles:
        reason = tile.refusal(problem, arch)
        if reason is None and not large and 2 * (tile.shared_bytes(problem) + 1024) > arch.sm_shared_bytes:
            reason = "two blocks do not fit"
        if reason is None:
            return tile
        reasons.append(reason)
    raise LayerError(f"no tile does {problem.mode} of {problem.depth} x {problem.columns}: {reasons[-1]}")
