"""The numbers of one experts kernel: padded sizes, blocking, and where everything lies in the workspace.

Rows are (token, expert) slots sorted by expert; a segment is the rows of one active expert. Shared experts come after
the routed ones, with one row per token each; they read the same packed x rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moec.compiler.kernels.experts.layout import HALF, PANEL, padded
from moec.compiler.kernels.spec import ExpertsProblem
from moec.compiler.kernels.template.intrinsics import lanes_of
from moec.passes.ir.activation import Activation

MAX_TOKENS_PER_PASS = 4096
_LINE = 64
_NUM_COUNTERS = 4


@dataclasses.dataclass(frozen=True)
class Blocking:
    """What a kernel chooses for its instruction set.

    block_rows   rows that lie together in packed rows ([k block][row][32])
    step_rows    rows that one tile call computes; a multiple of block_rows
    wide_rows    packed rows are f32 (else bf16)
    l2_bytes     how much of a core's second-level cache a block of rows or of weights may fill
    task_bytes   weights that one gate_up task streams
    """

    block_rows: int
    step_rows: int
    wide_rows: bool
    l2_bytes: int
    task_bytes: int = 1 << 20


@dataclasses.dataclass(frozen=True)
class Plan:
    """A problem together with a level and its blocking; every property is a compile-time constant of the kernel."""

    problem: ExpertsProblem
    level: str
    blocking: Blocking

    @property
    def lanes(self) -> int:
        """f32 lanes of a vector."""
        return lanes_of(self.level)

    @property
    def activation(self) -> Activation:
        """The parsed activation."""
        return Activation.parse(self.problem.act)

    @property
    def num_segments(self) -> int:
        """Experts of the stack, routed and shared."""
        return self.problem.num_experts + self.problem.num_shared

    @property
    def slots_per_token(self) -> int:
        """K plus the shared experts."""
        return self.problem.top_k + self.problem.num_shared

    @property
    def depth_up(self) -> int:
        """H padded: k of the gate_up GEMM."""
        return padded(self.problem.hidden)

    @property
    def depth_down(self) -> int:
        """F padded: k of the down GEMM."""
        return padded(self.problem.inner)

    @property
    def panels_up(self) -> int:
        """Panels of the gate_up stack."""
        return self.depth_down * (2 if self.activation.gated else 1) // PANEL

    @property
    def columns_per_panel(self) -> int:
        """Inner columns that a gate_up panel makes."""
        return HALF if self.activation.gated else PANEL

    @property
    def panels_down(self) -> int:
        """Panels of the down stack."""
        return padded(self.problem.hidden) // PANEL

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight."""
        return 2 if self.problem.dtype == "bfloat16" else 4

    @property
    def products_per_slot(self) -> int:
        """Multiply-adds of one row."""
        return (self.panels_up * self.depth_up + self.panels_down * self.depth_down) * PANEL

    @property
    def row_bytes(self) -> int:
        """Bytes of one element of a packed row."""
        return 4 if self.blocking.wide_rows else 2

    @property
    def row_dtype(self) -> str:
        """dtype of packed rows."""
        return "float32" if self.blocking.wide_rows else "bfloat16"

    @property
    def up_panels_per_task(self) -> int:
        """Panels of one gate_up task."""
        return max(1, min(self.panels_up, self.blocking.task_bytes // (self.depth_up * PANEL * self.weight_bytes)))

    @property
    def up_groups(self) -> int:
        """gate_up tasks per unit of rows."""
        return -(-self.panels_up // self.up_panels_per_task)

    @property
    def unit_rows(self) -> int:
        """Rows of a gate_up task: as many as stay in the cache."""
        return self._cached_rows(self.depth_up)

    @property
    def down_depth_chunk(self) -> int:
        """k of the down GEMM done at a time, so that four panels of it stay in the cache; F padded if that fits."""
        most = max(PANEL, self.blocking.l2_bytes // (4 * PANEL * self.weight_bytes) // PANEL * PANEL)
        num_chunks = -(-self.depth_down // most)
        return padded(-(-self.depth_down // num_chunks))

    @property
    def down_rows(self) -> int:
        """Rows that the down GEMM goes through before the next panel."""
        return self._cached_rows(self.down_depth_chunk)

    def _cached_rows(self, depth: int) -> int:
        step = self.blocking.step_rows
        return max(step, self.blocking.l2_bytes // (depth * self.row_bytes) // step * step)

    def max_blocks(self, num_tokens: Any) -> Any:
        """Most row blocks that x is packed into."""
        return num_tokens * (self.problem.top_k + 1) // self.blocking.block_rows + self.num_segments + 1

    def regions(self, num_tokens: Any) -> list[tuple[str, str, Any]]:
        """(name, dtype, elements) of every workspace region, for an int or a TIR expression of tokens per pass."""
        slots = num_tokens * self.slots_per_token
        x_rows = num_tokens * (self.problem.top_k + min(1, self.problem.num_shared))
        segments = self.num_segments + 1
        return [
            ("counters", "int32", _NUM_COUNTERS * 16),
            ("totals", "int32", 16),
            ("cursor", "int32", self.num_segments),
            ("segment_expert", "int32", segments),
            ("segment_row", "int32", segments),
            ("segment_rows", "int32", segments),
            ("segment_x_row", "int32", segments),
            ("segment_task", "int32", segments),
            ("block_row", "int32", self.max_blocks(num_tokens)),
            ("block_rows", "int32", self.max_blocks(num_tokens)),
            ("row_token", "int32", slots),
            ("row_weight", "float32", slots),
            ("x_rows", self.row_dtype, x_rows * self.depth_up),
            ("h_rows", self.row_dtype, slots * self.depth_down),
            ("sums", "float32", num_tokens * (self.panels_down * PANEL)),
        ]

    def offsets(self, num_tokens: Any) -> tuple[dict[str, Any], Any]:
        """Byte offset of every region, each at a cache line, and the size of all."""
        place, at = {}, 0
        for name, dtype, count in self.regions(num_tokens):
            place[name] = at
            size = count * (2 if dtype == "bfloat16" else 4)
            at = at + (size + (_LINE - 1)) // _LINE * _LINE
        return place, at

    def workspace_bytes(self, num_tokens: int) -> int:
        """Scratch that a call with num_tokens tokens needs."""
        return self.offsets(min(num_tokens, MAX_TOKENS_PER_PASS))[1] if num_tokens else 0
