"""AVX-512 and AVX2 tiles: up to 12 (6) rows times a panel in vector registers, exact row counts.

AVX-512 holds 12 rows x 32 columns in 24 registers. AVX2 holds 3 x 32 or 6 x 16 in 12, so 4 to 6 rows take the panel's
halves one after the other. Every row count has code of its own: a row that is not there costs nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.ahead import (
    HALF_PANEL,
    NEXT_PANEL,
    by_steps,
    further_on,
    half_panel,
    has_rows_near,
    next_panel,
    rows_near,
)
from moec.compiler.kernels.experts.blocking import Blocking
from moec.compiler.kernels.experts.layout import HALF, PANEL
from moec.compiler.kernels.experts.plan import Plan
from moec.compiler.kernels.experts.tiles import Result, Step
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.flow import Vector, switch

DOT_BF16, WIDEN_BF16, F32 = "dot_bf16", "widen_bf16", "f32"
_BLOCK = PANEL * PANEL  # weights of one k block of a panel
_LINE_BYTES = 64


@dataclasses.dataclass(frozen=True)
class VectorTiles:
    """Tiles on vector registers; see moec.compiler.kernels.experts.tiles.

    method: DOT_BF16 (rows and weights bf16, the pair product), WIDEN_BF16 (rows f32, weights bf16), F32 (both f32).
    """

    between: ClassVar[bool] = False

    lanes: int
    max_rows: int
    wide_rows: int
    method: str
    blocking: Blocking

    def text(self, plan: Plan) -> str:
        """Nothing of its own."""
        return ""

    def begin(self) -> None:
        """Nothing to set up."""

    def end(self) -> None:
        """Nothing to give back."""

    def value(self, result: Result, row: Any, column: int, lanes: int) -> Any:
        """As it lies."""
        return result.out[result.place(row, column, lanes)]

    def step(self, step: Step) -> None:
        """One step of 1 to max_rows rows."""
        # common counts first: one row (decode), then the full block (prefill)
        counts = [1, self.max_rows, *range(2, self.max_rows)]
        switch(step.rows, list(dict.fromkeys(counts)), lambda rows: self._rows(step, rows))

    def _rows(self, step: Step, rows: int) -> None:
        by_steps(step, rows, self.blocking.share_rows, lambda asks: self._halves(step, rows, asks))

    def _halves(self, step: Step, rows: int, asks: str) -> None:
        if rows <= self.wide_rows:
            self._columns(step, rows, range(0, PANEL, self.lanes), asks)
            return
        for half in range(0, PANEL, HALF):
            self._columns(step, rows, range(half, half + HALF, self.lanes), asks)

    def _columns(self, step: Step, rows: int, columns: range, asks: str) -> None:
        """Rows times some of the panel's columns, a vector of them per entry of `columns`.

        asks: for what meanwhile, see by_steps().
        """
        lanes = self.lanes
        size = rows * len(columns)
        pairs = 4 if rows == 1 else 2 if rows <= 4 else 1  # unrolled k pairs: enough products to hide the loop
        w_k = PANEL if self.method == F32 else HALF  # weights between one k and the next
        line = _LINE_BYTES // (4 if self.method == F32 else 2)
        share = 2 * pairs * len(columns) * lanes  # of a block, asked for with so many pairs
        total = [Vector(lanes) for _ in range(size)]
        a_at = ins.let(T.Cast("int64", step.a_row) * step.a_depth + step.k_start * rows)
        if asks == NEXT_PANEL:
            ahead = next_panel(step, step.k_blocks, _BLOCK)
        elif asks == HALF_PANEL:
            ahead = half_panel(step, step.k_blocks, _BLOCK)
        else:
            distance, locality = self.blocking.distance(rows), self.blocking.locality(rows)
            ahead = further_on(step, step.k_blocks, _BLOCK, distance, locality)
        with T.serial(step.k_blocks) as kt:
            k = ins.let(T.Cast("int64", kt))
            fetch = ins.let(ahead.at(kt) + columns.start * PANEL // ahead.share)
            a_block = ins.let(a_at + k * (rows * PANEL))
            w_block = ins.let(step.w_at + k * _BLOCK)
            if has_rows_near(rows, self.max_rows, asks):
                rows_near(step, a_block, rows * PANEL, 2 if self.method == DOT_BF16 else 4, rows, range(rows))
            with T.serial(HALF // pairs) as part:
                fetch_at = ins.let(fetch + T.Cast("int64", part) * (share // ahead.share))
                for at in range(0, share // ahead.share, line):
                    ins.prefetch(T.address_of(step.w[0, 0, fetch_at + at]), ahead.locality)
                k_at = ins.let(T.Cast("int64", part) * (2 * pairs))
                emit = self._row_major if self.method == F32 else self._pairs
                emit(step, rows, columns, total, a_block + k_at, w_block + k_at * w_k, pairs)
        for r in range(rows):
            for n, column in enumerate(columns):
                T.buffer_store(step.out, total[r * len(columns) + n].value, [step.place(r, column, lanes)])

    def _add(self, total: Vector, left: Any, right: Any) -> None:
        if self.method == DOT_BF16:
            total.set(ins.dot_bf16(total.value, left, right))
        else:
            total.set(T.fma(left, right, total.value))

    def _row_major(
        self,
        step: Step,
        rows: int,
        columns: range,
        total: list[Vector],
        a_at: Any,
        w_at: Any,
        pairs: int,
    ) -> None:
        """2 * pairs k of the row32 layout."""
        lanes = self.lanes
        a_at, w_at = ins.let(a_at), ins.let(w_at)
        for k in range(2 * pairs):
            weights = [T.Bind(ins.load_f32(T.address_of(step.w[0, 0, w_at + k * PANEL + c]), lanes)) for c in columns]
            for r in range(rows):
                left = T.Bind(T.broadcast(step.a[a_at + r * PANEL + k], lanes))
                for n, weight in enumerate(weights):
                    self._add(total[r * len(columns) + n], left, weight)

    def _pairs(
        self,
        step: Step,
        rows: int,
        columns: range,
        total: list[Vector],
        a_at: Any,
        w_at: Any,
        pairs: int,
    ) -> None:
        """k pairs of the vnni32 layout."""
        lanes = self.lanes
        a_at, w_at = ins.let(a_at), ins.let(w_at)
        for pair in range(pairs):
            offsets = [(c // HALF) * (_BLOCK // 2) + pair * PANEL + (c % HALF) * 2 for c in columns]
            words = [T.Bind(ins.load_i32(T.address_of(step.w[0, 0, w_at + at]), lanes)) for at in offsets]
            if self.method == DOT_BF16:
                for r in range(rows):
                    word = ins.load_i32(T.address_of(step.a[a_at + r * PANEL + pair * 2]))
                    left = T.Bind(T.broadcast(word, lanes))
                    for n, weight in enumerate(words):
                        self._add(total[r * len(columns) + n], left, weight)
                continue
            for parity, widen in enumerate((ins.low_bf16, ins.high_bf16)):
                weights = [T.Bind(widen(word, lanes)) for word in words]
                for r in range(rows):
                    left = T.Bind(T.broadcast(step.a[a_at + r * PANEL + pair * 2 + parity], lanes))
                    for n, weight in enumerate(weights):
                        self._add(total[r * len(columns) + n], left, weight)


AVX512_ROWS, AVX2_ROWS, AVX2_WIDE_ROWS = 12, 6, 3


def vector_tiles(plan: Plan, method: str) -> VectorTiles:
    """The tiles of the plan's level."""
    lanes, rows, wide = (8, AVX2_ROWS, AVX2_WIDE_ROWS) if plan.level == "avx2" else (16, AVX512_ROWS, AVX512_ROWS)
    return VectorTiles(lanes, rows, wide, method, plan.blocking)
