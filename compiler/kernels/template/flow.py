"""Control flow for IRBuilder templates: mutable scalars, if/else chains, dynamic work sharing between threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.template.intrinsics import fetch_add, let, num_threads


class Scalar:
    """A mutable local variable; LLVM keeps it in a register.

    Scope "global" is the stack for what is small (less than 1024 bytes); "local" would be a heap block.
    """

    def __init__(self, dtype: str, value: Any) -> None:
        self._cell = T.alloc_buffer((1,), dtype)
        self.set(value)

    def set(self, value: Any) -> None:
        """Assigns."""
        T.buffer_store(self._cell, value, [0])

    @property
    def value(self) -> Any:
        """The current value, as an expression that reads it where it is used."""
        return self._cell[0]


class Vector:
    """A mutable vector variable of float32 or int32 lanes, zero at first."""

    def __init__(self, lanes: int, dtype: str = "float32") -> None:
        self._cell = T.alloc_buffer((lanes,), dtype, align=64)
        self._place = T.ramp(0, 1, lanes)
        self._zero = T.broadcast(T.int32(0) if dtype == "int32" else T.float32(0), lanes)
        self.clear()

    def clear(self) -> None:
        """Sets every lane to zero."""
        self.set(self._zero)

    def set(self, value: Any) -> None:
        """Assigns."""
        T.buffer_store(self._cell, value, [self._place])

    @property
    def value(self) -> Any:
        """The current value, read where the expression is used."""
        return self._cell[self._place]


def when(condition: Any, then: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
    """Emits if/else around what the callbacks emit."""
    with T.If(condition):
        with T.Then():
            then()
        if otherwise is not None:
            with T.Else():
                otherwise()


def switch(selector: Any, cases: list[int], emit: Callable[[int], None]) -> None:
    """Emits `emit(case)` for the case that equals the selector; the last case stands for every other value."""
    if len(cases) == 1:
        emit(cases[0])
        return
    when(selector == cases[0], lambda: emit(cases[0]), lambda: switch(selector, cases[1:], emit))


def on_threads(prologue: Callable[[], Callable[[], None]], epilogue: Callable[[], None] | None = None) -> None:
    """Runs a worker on every thread. prologue emits what a thread sets up once and gives the emitter of its work."""
    with T.parallel(T.Bind(num_threads())):
        prologue()()
        if epilogue is not None:
            epilogue()


def fetch_tasks(counter: Any, num_tasks: Any, emit_task: Callable[[Any], None]) -> None:
    """In a worker: takes task numbers from a shared counter (address of a zeroed i32) until all are taken."""
    task = Scalar("int32", fetch_add(counter, 1))
    with T.While(task.value < num_tasks):
        emit_task(let(task.value))
        task.set(fetch_add(counter, 1))
