"""What the phases ask of a tile computation on any instruction set: a step of rows times a panel of weights."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from moec.compiler.kernels.experts.plan import Plan, Side


@dataclasses.dataclass(frozen=True)
class Step:
    """C[rows, 32] = A[rows, k] x B[k, 32] for k in [k_start, k_start + 32 * k_blocks), all values TIR expressions.

    a            buffer of packed rows, [k block][row][32] per block of rows
    a_row        row in `a` where the step's first block starts
    a_depth      padded depth of `a`: elements per row (python int)
    rows         1 .. step_rows
    w            flat index base is w[0, 0, 0]; w_at: element offset of the panel's first k block of the step (i64)
    next_at      element offset of the panel that this thread reads next
    index, count the step's number among the steps over the same panel: the others find it in the cache
    out          f32 buffer [step_rows * 32] that receives C, row-major; of int8 rows without the rows' own scales
    panel_at     element of w where the panel starts: channel scales
    side         the stack that w is (python object)
    sums         f32 [row][num_sums] sums of a's rows over groups, where the tiles ask for them
    first_sum    number of the step's first group
    split        whether the rows of the step's segment are int16 (bool; side.planes == 2)
    """

    a: Any
    a_row: Any
    a_depth: int
    rows: Any
    w: Any
    w_at: Any
    next_at: Any
    k_start: Any
    k_blocks: Any
    index: Any
    count: Any
    out: Any
    panel_at: Any
    side: Side
    sums: Any
    num_sums: int
    first_sum: Any
    split: Any


class Tiles(Protocol):
    """Emits the inner product of a step."""

    def text(self, plan: Plan) -> str:
        """LLVM IR of the functions that the tiles call."""

    def begin(self) -> None:
        """Emits what a thread needs once."""

    def step(self, step: Step) -> None:
        """Emits code that fills step.out."""

    def end(self) -> None:
        """Emits what a thread gives back."""
