"""The grouped GEMMs of an expert layer: what they compute, how a block of threads is laid out, and what fits.

gate_up       h[S,F] = act(x[token of slot] @ w_gate_up[expert]^T (+ b))    rows in slot_order
gate_up_part  the sums before bias and activation, f32[splits*S,2F] in slot_order, for `split_activation`
down          part[slot] = h[row of slot] @ w_down[expert]^T (+ b)          scattered to slot ids, for `combine`
"""

from __future__ import annotations

import dataclasses

from moec.compiler.codegen.cuda_archs import Architecture
from moec.passes.ir.activation import Activation

ROW_BYTES = 128  # of one row of a tile in shared memory: 64 bf16 or 128 e4m3
ELEMENT_BYTES = {"bfloat16": 2, "float8_e4m3fn": 1}
MODES = ("gate_up", "gate_up_part", "down")
CODE_BITS, GROUPS = (4, 8), (32, 64, 128)
UNIT_ROWS, UNIT_DEPTH = 16, 64  # of a unit of packed codes: see codes.py


@dataclasses.dataclass(frozen=True)
class GemmProblem:
    """One of the two GEMMs of moec::experts for fixed weights and any number of tokens.

    mode: of MODES.  depth: K of the GEMM (H, or F for down).  columns: of the result (F; 2F for gate_up_part; H for
    down).  num_experts: stacked ones, shared included.  slots_per_token: top_k + shared.  act: of gate_up, see
    Activation.  dtype: of x and weights; float8_e4m3fn comes with x_scale f32[rows of x], w_scale f32[E, weight rows].
    has_bias: f32[E, weight rows].  part_dtype: of down's result, "float32" or "bfloat16".
    code_bits: 4 or 8 where weights are codes, packed by codes.py; group: values along K that share a bf16 scale
    (w_scale bf16[E, K/group, weight rows]), 0: one f32 scale for each weight row (w_scale f32[E, weight rows]).
    in_slot_order: rows of x lie in slot_order for gate_up too, gathered and weighted before.
    reduce: down adds each row, times its weight, to y f32[T,H], in no fixed order; num_shared and has_shared_weight as
    in moec::experts, for this alone.
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
    code_bits: int = 0
    group: int = 0
    in_slot_order: bool = False
    reduce: bool = False
    num_shared: int = 0
    has_shared_weight: bool = False

    @property
    def halves(self) -> int:
        """2 where a block computes gate and up columns side by side."""
        return 2 if self.mode == "gate_up" and Activation.parse(self.act).gated else 1

    @property
    def weight_rows(self) -> int:
        """Rows of an expert's weight matrix: gate and up of each column."""
        return self.columns * self.halves

    @property
    def element_bytes(self) -> int:
        """Of x, and of weights that are no codes."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def block_depth(self) -> int:
        """Elements of K in one row of a tile."""
        return ROW_BYTES // self.element_bytes

    @property
    def steps(self) -> int:
        """Tiles that a block goes through along K."""
        return self.depth // self.block_depth

    @property
    def gathers(self) -> bool:
        """Rows of x are tokens, found by slot."""
        return self.mode != "down" and not self.in_slot_order

    @property
    def result_dtype(self) -> str:
        """Of what the GEMM writes."""
        return {"gate_up": "bfloat16", "gate_up_part": "float32", "down": self.part_dtype}[self.mode]

    @property
    def scale_rows(self) -> int:
        """Rows of group scales that a step of K needs."""
        return max(1, UNIT_DEPTH // self.group) if self.group else 0

    def refusal(self) -> str | None:
        """Why no CUDA GEMM takes the problem, or None."""
        if self.mode not in MODES:
            return f"mode {self.mode!r}, expected {', '.join(MODES)}"
        if self.dtype not in ELEMENT_BYTES:
            return f"{self.dtype} weights, only {' and '.join(ELEMENT_BYTES)} are built"
        if self.depth % self.block_depth:
            return f"a depth of {self.depth}, not a multiple of {self.block_depth}; pad the weights with zeros"
        if self.reduce and (self.mode != "down" or self.part_dtype != "float32"):
            return f"atomic sums of {self.mode} in {self.part_dtype}; only down in float32"
        if self.mode == "gate_up_part" and self.has_bias:
            return "a bias before the splits are summed; split_activation adds it"
        return self._codes_refusal() if self.code_bits else None

    def _codes_refusal(self) -> str | None:
        if self.code_bits not in CODE_BITS or self.group not in (0, *GROUPS):
            return f"codes of {self.code_bits} bits in groups of {self.group}; 4 or 8, groups of 32, 64, 128 or a row"
        if self.dtype != "bfloat16":
            return f"codes with x in {self.dtype}; only bfloat16"
        if self.group and self.depth % self.group:
            return f"a depth of {self.depth}, not a multiple of its groups of {self.group}"
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
        """Threads of a block."""
        return self.warps_m * self.warps_n * 32

    def weight_bytes(self, problem: GemmProblem) -> int:
        """Of the weights of a stage, without scales."""
        return self.columns * (UNIT_DEPTH * problem.code_bits // 8 if problem.code_bits else ROW_BYTES)

    def stage_bytes(self, problem: GemmProblem) -> int:
        """A stage of the ring: rows of x, weights or codes, group scales."""
        return self.rows * ROW_BYTES + self.weight_bytes(problem) + problem.scale_rows * self.columns * 2

    def shared_bytes(self, problem: GemmProblem) -> int:
        """Shared memory of a block: the whole ring."""
        return self.stages * self.stage_bytes(problem)

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
        if self.weight_bytes(problem) // 16 % self.threads:
            return f"{self.columns} weight rows are no whole number of copies for {self.threads} threads"
        if self.splits > 1 and problem.mode == "gate_up":
            return "gate_up with split K: the activation needs whole sums; gate_up_part makes them"
        if self.splits > problem.steps:
            return f"{self.splits} splits of {problem.steps} steps"
        needed = self.shared_bytes(problem)
        if needed > arch.block_shared_bytes:
            return f"{needed} bytes of shared memory, a block on {arch.name} has {arch.block_shared_bytes}"
        return None
