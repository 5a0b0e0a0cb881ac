"""How the rows of a segment are cut: into blocks that lie together, and into units that stay in a cache, of steps.

A step is one tile call. On vector registers a step is a block, and one of 1 to 4 rows takes about as long as one of 6.
So the blocks of a segment are even there (Blocking.even_blocks), of 37 rows 10, 9, 9 and 9, not 12, 12, 12 and 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.plan import Plan
from moec.compiler.kernels.template import intrinsics as ins


@dataclasses.dataclass(frozen=True)
class Parts:
    """count: how many. of: number -> (first row in the segment, rows). rows: of all of them."""

    count: Any
    of: Callable[[Any], tuple[Any, Any]]
    rows: Any


class Units(Protocol):
    """count: of units of at most so many rows."""

    count: Any

    def steps(self, unit: Any) -> Parts:
        """The steps of one of them."""


def blocks_of(plan: Plan, rows: Any) -> Parts:
    """The blocks of a segment of so many rows."""
    if plan.blocking.even_blocks:
        blocks = _EvenBlocks(plan, rows)
        return Parts(blocks.count, blocks.of, rows)
    size = plan.blocking.block_rows
    return Parts(T.floordiv(rows + (size - 1), size), lambda b: (b * size, T.min(rows - b * size, size)), rows)


def units_of(plan: Plan, rows: Any, most: int) -> Units:
    """The units of a segment of so many rows. most: a multiple of step_rows."""
    return _EvenUnits(plan, rows, most) if plan.blocking.even_blocks else _Units(plan, rows, most)


class _Units:
    """Of as many rows as can be, or Blocking.even_rows, and their steps too."""

    def __init__(self, plan: Plan, rows: Any, most: int) -> None:
        self._plan, self._rows = plan, rows
        self._size = ins.let(plan.part_rows(rows, most))
        self.count = T.floordiv(rows + (most - 1), most)

    def steps(self, unit: Any) -> Parts:
        """The steps of one of them."""
        step_rows = self._plan.blocking.step_rows
        first = ins.let(unit * self._size)
        rows = ins.let(T.min(self._rows - first, self._size))
        count = ins.let(T.floordiv(rows + (step_rows - 1), step_rows))
        size = ins.let(self._plan.part_rows(rows, step_rows))

        def of(i: Any) -> tuple[Any, Any]:
            start = ins.let(first + i * size)
            return start, ins.let(T.min(first + rows - start, size))

        return Parts(count, of, rows)


class _EvenBlocks:
    """As few blocks as can be, the first ones of a row more than the others."""

    def __init__(self, plan: Plan, rows: Any) -> None:
        size = plan.blocking.block_rows
        self.count = ins.let(T.truncdiv(rows + (size - 1), size))
        self._rows = ins.let(T.truncdiv(rows, self.count))
        self._longer = ins.let(rows - self._rows * self.count)

    def start(self, number: Any) -> Any:
        """First row of a block, or, with their count, of what follows them."""
        return number * self._rows + T.min(number, self._longer)

    def of(self, number: Any) -> tuple[Any, Any]:
        """First row and rows of a block."""
        return ins.let(self.start(number)), ins.let(self._rows + T.Cast("int32", number < self._longer))


class _EvenUnits:
    """So many of the even blocks each, which are the steps."""

    def __init__(self, plan: Plan, rows: Any, most: int) -> None:
        self._blocks, self._per_unit = _EvenBlocks(plan, rows), most // plan.blocking.block_rows
        self.count = T.truncdiv(self._blocks.count + (self._per_unit - 1), self._per_unit)

    def steps(self, unit: Any) -> Parts:
        """The steps of one of them."""
        blocks = self._blocks
        first = ins.let(unit * self._per_unit)
        count = ins.let(T.min(blocks.count - first, self._per_unit))
        rows = ins.let(blocks.start(first + count) - blocks.start(first))
        return Parts(count, lambda i: blocks.of(ins.let(first + i)), rows)
