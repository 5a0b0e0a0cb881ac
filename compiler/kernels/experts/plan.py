"""The numbers of one experts kernel: padded sizes, blocking, and where everything lies in the workspace.

Rows are (token, expert) slots sorted by expert; a segment is the rows of one active expert. Shared experts come after
the routed ones, with one row per token each; they read the same packed x rows.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts import codes as codes_of
from moec.compiler.kernels.experts.blocking import Blocking
from moec.compiler.kernels.experts.codes import INT8_MOST, INT16_MOST, Codes
from moec.compiler.kernels.experts.layout import HALF, PANEL, padded
from moec.compiler.kernels.spec import ExpertsProblem
from moec.compiler.kernels.template.intrinsics import has_dot, lanes_of
from moec.passes.ir.activation import Activation

MAX_TOKENS_PER_PASS = 4096
_LINE = 64
COUNTERS = range(0, 8 * 16, 16)  # elements of the counters of tasks, a cache line apart
_ITEM_BYTES = {"int8": 1, "bfloat16": 2}  # others: 4


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two stacks: gate_up or down. depth: K padded. columns: of an expert, padded. codes: None: as dtype.

    planes: of bytes that a segment's rows lie in: 1: int8; 2: int16, where the segment has few rows; 0: as numbers.
    split_rows: planes == 2: most rows of a segment that are int16; 0: always.
    sum_factor: sums of integer rows over groups are multiplied by it and stay integers, to be added to products with
        codes as stored: it is minus what those are above their numbers. 0: sums are f32.
    """

    depth: int
    columns: int
    codes: Codes | None
    dtype: str
    planes: int = 0
    split_rows: int = 0
    sum_factor: int = 0

    def is_split(self, segment_rows: Any) -> Any:
        """Whether rows of a segment of so many are int16 where they meet this stack (an expression)."""
        if self.planes != 2:
            return T.bool(False)
        return segment_rows <= self.split_rows if self.split_rows else segment_rows > 0

    @property
    def coded(self) -> Codes:
        """The codes of a quantised stack; kernels of quantised weights refuse others before they are built."""
        assert self.codes is not None
        return self.codes

    @property
    def has_sums(self) -> bool:
        """The tiles want sums of rows over groups: they multiply codes without their zeros."""
        return self.codes is not None and (self.planes > 0 or self.codes.has_zeros)

    @property
    def panels(self) -> int:
        """Panels of one expert."""
        return self.columns // PANEL

    @property
    def panel_elements(self) -> int:
        """Elements of the packed tensor in a panel."""
        return self.codes.panel_bytes if self.codes else self.depth * PANEL

    @property
    def panel_bytes(self) -> int:
        """Bytes of a panel."""
        return self.panel_elements * (1 if self.codes else 2 if self.dtype == "bfloat16" else 4)

    def at(self, k: Any) -> Any:
        """Element of a panel where k (a multiple of the block, an int or a TIR expression) starts."""
        if self.codes is None:
            return k * PANEL
        if isinstance(k, int):
            return self.codes.head_bytes + k // self.codes.block * self.codes.block_bytes
        return T.floordiv(k, self.codes.block) * self.codes.block_bytes + self.codes.head_bytes


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

    @functools.cached_property
    def up(self) -> Side:
        """The gate_up stack."""
        columns = padded(self.problem.inner) * (2 if self.activation.gated else 1)
        return self._side(self.problem.format_up, self.problem.hidden, columns)

    @functools.cached_property
    def down(self) -> Side:
        """The down stack."""
        return self._side(self.problem.format_down, self.problem.inner, padded(self.problem.hidden))

    def _side(self, format: str, depth: int, columns: int) -> Side:
        if not format:
            return Side(padded(depth), columns, None, self.problem.dtype)
        codes = codes_of.of_format(format, depth)
        split = codes.split and has_dot(self.level) and not self.blocking.wide_rows
        rows = self.blocking
        few = rows.split_rows_short if codes.is_short else rows.split_rows
        most = rows.split_rows_exponents if codes.scales_exponents else few
        planes = 1 if codes.int8 else 2 if split else 0
        return Side(codes.padded_depth, columns, codes, "uint8", planes, most, self._sum_factor(codes, planes))

    def _sum_factor(self, codes: Codes, planes: int) -> int:
        """As in Side. The tile unit's products are f32 when they are corrected; AVX2 gives codes of 8 bits a sign."""
        other = self.level == "amx_bf16" or (self.level == "avx2" and codes.bits == 8)
        fits = planes and codes.sums_fit(INT8_MOST if planes == 1 else INT16_MOST)
        return -codes.byte_offset if fits and not other else 0

    @property
    def int8(self) -> bool:
        """Rows are rounded to int8."""
        return self.up.codes is not None and self.up.codes.int8

    @property
    def has_sums(self) -> bool:
        """One of the stacks wants sums of rows."""
        return self.up.has_sums or self.down.has_sums

    @property
    def splits(self) -> bool:
        """Rows of segments with few of them are int16, for one of the stacks at least."""
        return 2 in (self.up.planes, self.down.planes)

    @property
    def step(self) -> int:
        """k that lie together for a row in packed rows (int16: of one plane, in numbers of 16 bits)."""
        return codes_of.INT8_STEP if self.int8 else PANEL

    @property
    def depth_up(self) -> int:
        """H padded: k of the gate_up GEMM."""
        return self.up.depth

    @property
    def depth_down(self) -> int:
        """F padded: k of the down GEMM."""
        return self.down.depth

    @property
    def width_down(self) -> int:
        """Columns of h that meet codes: of whole panels, but only F where the activation of 0 is not 0 (sigmoid).

        Beyond F a code is 0 as it is stored, which need not mean 0; numbers are padded with zeros.
        """
        of_zero = self.activation(torch.zeros(2 if self.activation.gated else 1))
        whole = padded(self.problem.inner)
        return whole if self.down.codes is None or not of_zero.any() else self.problem.inner

    @property
    def panels_up(self) -> int:
        """Panels of the gate_up stack."""
        return self.up.panels

    @property
    def columns_per_panel(self) -> int:
        """Inner columns that a gate_up panel makes."""
        return HALF if self.activation.gated else PANEL

    @property
    def panels_down(self) -> int:
        """Panels of the down stack."""
        return padded(self.problem.hidden) // PANEL

    @property
    def item_bytes(self) -> int:
        """Bytes of an element of x and y."""
        return 2 if self.problem.dtype == "bfloat16" else 4

    @property
    def sums_up(self) -> int:
        """Sums of a row of x: one per group."""
        return self.up.codes.num_groups if self.up.codes else 1

    @property
    def sums_down(self) -> int:
        """Sums of a row of h."""
        return -(-self.depth_down // self.sum_depth_down)

    @property
    def sum_depth_down(self) -> int:
        """k of one sum of a row of h: a group, or what is done at a time where a column has one scale."""
        return (self.down.codes.group if self.down.codes else 0) or self.down_depth_chunk

    @property
    def x_rows_per_token(self) -> int:
        """Packed rows of a token's x: one per expert, and one for all shared experts."""
        return self.problem.top_k + min(1, self.problem.num_shared)

    @property
    def rounds_tokens(self) -> bool:
        """Rows of x are int8 and the same for all experts of a token, so it is rounded once."""
        return self.up.planes == 1 and not self.problem.weight_on_input

    @property
    def copies_tokens(self) -> bool:
        """Rows of x are parts of x as they are, and no tile wants sums of them."""
        same = self.problem.dtype == self.row_dtype and self.problem.hidden == self.depth_up
        return same and not self.up.has_sums and not self.problem.weight_on_input

    @property
    def products_per_slot(self) -> int:
        """Multiply-adds of one row."""
        return (self.panels_up * self.depth_up + self.panels_down * self.depth_down) * PANEL

    @property
    def row_bytes(self) -> int:
        """Bytes of one element of a packed row."""
        return 1 if self.int8 else 4 if self.blocking.wide_rows else 2

    @property
    def row_dtype(self) -> str:
        """dtype of packed rows."""
        return "int8" if self.int8 else "float32" if self.blocking.wide_rows else "bfloat16"

    @property
    def up_panels_per_task(self) -> int:
        """Panels of one gate_up task."""
        return max(1, min(self.panels_up, self.blocking.task_bytes // self.up.panel_bytes))

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
        block = self.down.codes.block if self.down.codes else PANEL
        wide = self.item_bytes  # codes of a panel may be turned into numbers of this size
        most = max(block, self.blocking.chunk_bytes // (4 * PANEL * wide) // block * block)
        num_chunks = -(-self.depth_down // most)
        return -(-self.depth_down // (num_chunks * block)) * block

    @property
    def down_rows(self) -> int:
        """Rows that the down GEMM goes through before the next panel."""
        return self._cached_rows(self.down_depth_chunk)

    def _cached_rows(self, depth: int) -> int:
        step = self.blocking.step_rows
        return max(step, self.blocking.l2_bytes // (depth * self.row_bytes) // step * step)

    @property
    def share_rows(self) -> int:
        """Blocking.share_rows; rows of int16 have two products where others have one."""
        given = self.blocking.share_rows
        return self.blocking.block_rows if given and self.splits else given

    def part_rows(self, rows: Any, most: int) -> Any:
        """Rows of each part but the last when `rows` (a TIR expression) are cut into as few parts of `most` as can be.

        most: a multiple of block_rows. The number of parts is the same either way.
        """
        if not self.blocking.even_rows:
            return T.int32(most)
        size, parts = self.blocking.block_rows, T.max(T.floordiv(rows + (most - 1), most), 1)
        return T.floordiv(T.floordiv(rows + parts - 1, parts) + (size - 1), size) * size

    def max_blocks(self, num_tokens: Any) -> Any:
        """Most row blocks that x is packed into."""
        return num_tokens * self.slots_per_token // self.blocking.block_rows + self.num_segments + 1

    def regions(self, num_tokens: Any) -> list[tuple[str, str, Any]]:
        """(name, dtype, elements) of every workspace region, for an int or a TIR expression of tokens per pass."""
        slots = num_tokens * self.slots_per_token
        x_rows = num_tokens * self.x_rows_per_token
        segments = self.num_segments + 1
        return [
            ("counters", "int32", COUNTERS.stop),
            ("totals", "int32", 16),
            ("cursor", "int32", self.num_segments),
            ("segment_expert", "int32", segments),
            ("segment_row", "int32", segments),
            ("segment_rows", "int32", segments),
            ("segment_x_row", "int32", segments),
            ("segment_task", "int32", segments),
            ("block_row", "int32", self.max_blocks(num_tokens)),
            ("block_rows", "int32", self.max_blocks(num_tokens)),
            ("block_split", "int32", self.max_blocks(num_tokens) if self.splits else 0),
            ("row_token", "int32", slots),
            ("row_weight", "float32", slots),
            ("x_rows", self.row_dtype, x_rows * self.depth_up),
            ("h_rows", self.row_dtype, slots * self.depth_down),
            ("sums", "float32", num_tokens * (self.panels_down * PANEL)),
            *self._extra_regions(x_rows, slots),
        ]

    def _extra_regions(self, x_rows: Any, slots: Any) -> list[tuple[str, str, Any]]:
        """Of quantised rows: h before it is rounded, scales, and sums of rows."""
        regions: list[tuple[str, str, Any]] = []
        if self.up.planes:
            regions += [("x_scale", "float32", x_rows)]
        if self.rounds_tokens:
            tokens = x_rows // self.x_rows_per_token
            regions += [("token_rows", "int8", tokens * self.depth_up), ("token_scale", "float32", tokens)]
            regions += [("token_sums", "float32", tokens * self.sums_up)]
        if self.down.planes:
            wide = slots * padded(self.problem.inner)
            regions += [("h_wide", "bfloat16", wide), ("h_scale", "float32", slots)]
        if self.has_sums:
            regions += [("x_sums", "float32", x_rows * self.sums_up), ("h_sums", "float32", slots * self.sums_down)]
        return regions

    def offsets(self, num_tokens: Any) -> tuple[dict[str, Any], Any]:
        """Byte offset of every region, each at a cache line, and the size of all."""
        place, at = {}, 0
        for name, dtype, count in self.regions(num_tokens):
            place[name] = at
            size = count * _ITEM_BYTES.get(dtype, 4)
            at = at + (size + (_LINE - 1)) // _LINE * _LINE
        return place, at

    def workspace_bytes(self, num_tokens: int) -> int:
        """Scratch that a call with num_tokens tokens needs."""
        return self.offsets(min(num_tokens, MAX_TOKENS_PER_PASS))[1] if num_tokens else 0
