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

from moec.compiler.kernels.experts.layout import PANEL
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.flow import Scalar, when


class Waiting:
    """What a thread has still to do for its last step. Made once on each thread.

    between: the tiles emit share() between their products; else a step's rows are done behind it. depth: k of a usual
    step, for share(). fields: name -> dtype of what is to be known of a step; emit(row, fields) does one row of it (r:
    i32 expression). Results of steps lie in turn in the halves of `out`, without `between` always in the first.
    """

    def __init__(
        self,
        between: bool,
        step_rows: int,
        depth: int,
        fields: Mapping[str, str],
        emit: Callable[[Any, SimpleNamespace], None],
    ) -> None:
        self._between, self._step_rows, self._depth, self._emit = between, step_rows, depth, emit
        size = step_rows * PANEL
        self.out = T.alloc_buffer((size * (2 if between else 1),), "float32", scope="local", align=64)
        self._row, self._rows = Scalar("int32", 0), Scalar("int32", 0)
        self._next, self._last = Scalar("int32", 0), Scalar("int32", size if between else 0)
        self._fields = {name: Scalar(dtype, T.Cast(dtype, T.int32(0))) for name, dtype in fields.items()}

    @property
    def next_at(self) -> Any:
        """Element of `out` where the next step's results begin."""
        return self._next.value

    def put(self, count: Any, /, **fields: Any) -> None:
        """A step has filled `count` rows from next_at on."""
        if self._between:
            self.all()
        for name, value in fields.items():
            self._fields[name].set(value)
        self._row.set(T.int32(0))
        self._rows.set(count)
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
        when(self._row.value < self._rows.value, lambda: self._some(T.min(self._rows.value - self._row.value, most)))

    def all(self) -> None:
        """All that wait."""
        self._some(self._rows.value - self._row.value)

    def _some(self, count: Any) -> None:
        first, num = ins.let(self._row.value), ins.let(count)
        known = {name: ins.let(scalar.value) for name, scalar in self._fields.items()}
        fields = SimpleNamespace(out_at=ins.let(self._last.value), **known)
        with T.serial(num) as i:
            self._emit(ins.let(first + i), fields)
        self._row.set(first + num)
