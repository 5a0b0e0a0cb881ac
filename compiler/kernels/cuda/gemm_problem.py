"""The grouped GEMMs of an expert layer: what they compute, how a block of threads is laid out, and what fits.

gate_up  h[S,F] = act(x[token of slot] @ w_gate_up[expert]^T (+ b))      rows in slot_order
down     part[slot] = h[row of slot] @ w_down[expert]^T (+ b)            scattered to slot ids, for `combine`
"""

from __future__ import annotations

import dataclasses

from moec.compiler.codegen.cuda_archs import Architecture
from moec.passes.ir.activation import Activation

ROW_BYTES = 128  # of one row of a tile in shared memory: 64 bf16 or 128 e4m3
ELEMENT_BYTES = {"bfloat16": 2, "float8_e4m3fn": 1}


@dataclasses.dataclass(frozen=True)
class GemmProblem:
    """One of the two GEMMs of moec::experts for fixed weights and any number of tokens.

    mode: "gate_up" or "down".  depth: K of the GEMM (H, or F for down).  columns: of the result (F, or H for down).
    num_experts: stacked ones, shared included.  slots_per_token: top_k + shared.  act: of gate_up, see Activation.
    dtype: of x and weights; float8_e4m3fn comes with x_scale f32[rows of x] and w_scale f32[E, weight rows].
    has_bias: f32[E, weight rows].  part_dtype: of down's result, "float32" or "bfloat16".
    """

    mode: str
    depth: int
    columns: int
    num_experts: int
    slots_per_token: int
    act: str = "silu"
    dtype: str = "bfloat16"
    has_bias: bool = False
    part_dtype: str = "float32"

    @property
    def halves(self) -> int:
        """2 where a block computes gate and up columns side by side."""
        return 2 if self.mode == "gate_up" and Activation.parse(self.act).gated else 1

    @property
    def weight_rows(self) -> int:
        return self.columns * self.halves

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def block_depth(self) -> int:
        """Elements of K in one row of a tile."""
        return ROW_BYTES // self.element_bytes

    @property
    def steps(self) -> int:
        return self.depth // self.block_depth

    def refusal(self) -> str | None:
        """Why no CUDA GEMM takes the problem, or None."""
        if self.mode not in ("gate_up", "down"):
            return f"mode {self.mode!r}, expected gate_up or down"
        if self.dtype not in ELEMENT_BYTES:
            return f"{self.dtype} weights, only {' and '.join(ELEMENT_BYTES)} are built"
        if self.depth % self.block_depth:
            return f"a depth of {self.depth}, not a multiple of {self.block_depth}; pad the weights with zeros"
        return None


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a block of mma.sync threads is laid out.

    rows: of the result (slots of one expert).  columns: weight rows, gate and up ones together.  stages: of the ring of
    tiles in shared memory.  warps_m, warps_n: warps over rows and over result columns.  splits: of K over blocks.
    """

    rows: int = 16
    columns: int = 128
    stages: int = 4
    warps_m: int = 1
    warps_n: int = 4
    splits: int = 1

    @property
    def threads(self) -> int:
        return self.warps_m * self.warps_n * 32

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.rows + self.columns) * ROW_BYTES

    def refusal(self, problem: GemmProblem, arch: Architecture) -> str | None:
        """Why the tile does not do the problem on the architecture, or None."""
        if reason := problem.refusal():
            return reason
        if problem.dtype == "float8_e4m3fn" and not arch.fp8_mma:
            return f"{arch.name} has no mma.sync for e4m3"
        out = self.columns // problem.halves
        if problem.columns % out:
            return f"{problem.columns} columns, not a multiple of the tile's {out}"
        if self.rows % (16 * self.warps_m) or out % (16 * self.warps_n):
            return f"{self.rows} x {out} does not divide among {self.warps_m} x {self.warps_n} warps of 16 x 16"
        if self.columns % (self.threads // 8):
            return f"{self.columns} weight rows, not a multiple of {self.threads // 8}"
        if self.splits > 1 and problem.mode == "gate_up":
            return "gate_up with split K: the activation needs whole sums"
        if self.splits > problem.steps:
            return f"{self.splits} splits of {problem.steps} steps"
        if self.shared_bytes > arch.block_shared_bytes:
            return f"{self.shared_bytes} bytes of shared memory, a block on {arch.name} has {arch.block_shared_bytes}"
        return None
