"""What the phases ask of a tile computation on any instruction set: a step of rows times a panel of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.layout import PANEL
from moec.compiler.kernels.experts.plan import Plan, Side
from moec.compiler.kernels.experts.waiting import Waiting
from moec.compiler.kernels.template import intrinsics as ins


@dataclasses.dataclass(frozen=True)
class Result:
    """C of a step, all values TIR expressions.

    out          f32 buffer that has C from element out_at (i32) on, row-major, 32 columns
    w            flat index base is w[0, 0, 0]; panel_at: element where the panel starts: channel scales
    side         the stack that w is (python object)
    a_row        row of the packed rows where the step's first block starts
    sums         f32 [row][num_sums] sums of packed rows over groups, where the tiles ask for them
    first_sum    number of the step's first group
    """

    out: Any
    out_at: Any
    w: Any
    panel_at: Any
    side: Side
    a_row: Any
    sums: Any
    num_sums: int
    first_sum: Any

    def place(self, row: Any, column: int, lanes: int) -> Any:
        """Elements of `out` for so many columns of a row."""
        return T.ramp(self.out_at + (row * PANEL + column), 1, lanes)


@dataclasses.dataclass(frozen=True)
class Step(Result):
    """C[rows, 32] = A[rows, k] x B[k, 32] for k in [k_start, k_start + 32 * k_blocks), for each of its panels.

    a            buffer of packed rows, [k block][row][32] per block of rows
    a_depth      padded depth of `a`: elements per row (python int)
    rows         1 .. step_rows
    panels       consecutive panels, C of each after that of the one before; more than one where no other step goes over
                 them, with one block of rows, on the tile unit
    w_at         element offset of the first panel's first k block of the step (i64)
    next_at      element offset of the panel that this thread reads after these
    index, count the step's number among the steps over the same panel: the others find it in the cache
    split        whether the rows of the step's segment are int16 (bool; side.planes == 2)
    waiting      rows of the step before, of which the tiles may emit some between products
    """

    a: Any
    a_depth: int
    rows: Any
    panels: Any
    w_at: Any
    next_at: Any
    k_start: Any
    k_blocks: Any
    index: Any
    count: Any
    split: Any
    waiting: Waiting

    def panel(self, p: Any) -> Step:
        """The step over its p-th panel alone (an i32 expression)."""
        size, further = self.side.panel_elements, T.Cast("int64", p)
        at, panel_at = ins.let(self.w_at + further * size), ins.let(self.panel_at + further * size)
        next_at = ins.let(T.Select(p + 1 < self.panels, at + size, self.next_at))
        out_at = ins.let(self.out_at + p * self.rows * PANEL)
        return dataclasses.replace(self, panels=1, w_at=at, panel_at=panel_at, next_at=next_at, out_at=out_at)

    def each_panel(self, emit: Callable[[Step], None]) -> None:
        """emit(the step over one panel) for each of them in turn."""
        with T.serial(self.panels) as p:
            emit(self.panel(p))


class Tiles(Protocol):
    """Emits the inner product of a step.

    between: rows of the step before are emitted between the products (Waiting.share).
    """

    between: ClassVar[bool]

    def text(self, plan: Plan) -> str:
        """LLVM IR of the functions that the tiles call."""

    def begin(self) -> None:
        """Emits what a thread needs once."""

    def step(self, step: Step) -> None:
        """Emits code that fills the rows of step.out."""

    def value(self, result: Result, row: Any, column: int, lanes: int) -> Any:
        """f32 vector of a row's columns of C, without the scale of an integer row."""

    def end(self) -> None:
        """Emits what a thread gives back."""
