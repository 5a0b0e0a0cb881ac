"""Rows that wait for what is done with a step's results, which is done while the next step multiplies.

Between two steps on the tile unit neither products run nor weights are asked for, and both have to start anew after it.
So an activation or a sum is not emitted behind the step, but a few rows at a time between the products of the next.
Steps of few rows whose codes are decoded leave the processor nothing to spare: they emit none (1 to 2 % at 16 tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.layout import PANEL, TILE_ROWS
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.flow import Scalar, when


class Waiting:
    """What a thread has still to do for its last step. Made once on each thread.

    between: the tiles emit share() between their products; else a step's rows are done behind it. depth: k of a usual
    step, for share(). fields: name -> dtype of what is to be known of a step; emit(row, panel, fields) does one row of
    one of its panels (i32 expressions). Results of steps lie in turn in the halves of `out`, without `between` always
    in the first.
    """

    def __init__(
        self,
        between: bool,
        step_rows: int,
        depth: int,
        fields: Mapping[str, str],
        emit: Callable[[Any, Any, SimpleNamespace], None],
    ) -> None:
        self._between, self._step_rows, self._depth, self._emit = between, step_rows, depth, emit
        size = step_rows * PANEL
        self.out = T.alloc_buffer((size * (2 if between else 1),), "float32", scope="local", align=64)
        self._row, self._panel = Scalar("int32", 0), Scalar("int32", 0)
        self._rows, self._left = Scalar("int32", 0), Scalar("int32", 0)
        self._next, self._last = Scalar("int32", 0), Scalar("int32", size if between else 0)
        self._fields = {name: Scalar(dtype, T.Cast(dtype, T.int32(0))) for name, dtype in fields.items()}

    @property
    def next_at(self) -> Any:
        """Element of `out` where the next step's results begin."""
        return self._next.value

    def panels_together(self, rows: Any, count: Any) -> Any:
        """How many panels a step goes over: as many as `out` has room for where `rows` are one block and one step."""
        if not self._between:
            return T.int32(1)
        together = Scalar("int32", 1)  # a variable: TVM's simplifier would expand the expression, for minutes
        with T.If((count == 1) & (rows <= TILE_ROWS)), T.Then():
            together.set(T.max(T.truncdiv(T.int32(self._step_rows), T.max(rows, 1)), 1))
        return together.value

    def put(self, rows: Any, panels: Any, /, **fields: Any) -> None:
        """A step has filled so many rows of so many panels from next_at on."""
        if self._between:
            self.all()
        for name, value in fields.items():
            self._fields[name].set(value)
        self._row.set(T.int32(0))
        self._panel.set(T.int32(0))
        self._rows.set(rows)
        self._left.set(rows * panels)
        if not self._between:
            self.all()
            return
        filled = ins.let(self._next.value)
        self._next.set(self._last.value)
        self._last.set(filled)

    def share(self, depth: int) -> None:
        """So many rows that a step whose products take `depth` k at a time does all of them."""
        if not self._between:
            return
        most = -(-self._step_rows * depth // self._depth)
        when(self._left.value > 0, lambda: self._some(most))

    def all(self) -> None:
        """All that wait."""
        with T.While(self._left.value > 0):
            self._some(self._step_rows)

    def _some(self, most: int) -> None:
        """Rows of one panel."""
        first, panel = ins.let(self._row.value), ins.let(self._panel.value)
        num = ins.let(T.min(self._rows.value - first, most))
        known = {name: ins.let(scalar.value) for name, scalar in self._fields.items()}
        out_at = ins.let(self._last.value + panel * self._rows.value * PANEL)
        fields = SimpleNamespace(out_at=out_at, **known)
        with T.serial(num) as i:
            self._emit(ins.let(first + i), panel, fields)
        self._left.set(self._left.value - num)
        ends = T.Bind(first + num == self._rows.value)
        self._row.set(T.Select(ends, T.int32(0), first + num))
        self._panel.set(T.Select(ends, panel + 1, panel))
