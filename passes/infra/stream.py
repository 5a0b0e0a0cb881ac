"""Runs that share the matrices of experts: each expert is made once for all of them, and dropped before the next.

A run stops at every op over stacks of experts (passes/ir/evaluate.py, `steps`). Runs that stop at ops over the same
stacks go on together, so that of a layer one expert is in memory, however many runs there are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from torch import Tensor

from moec.passes.ir.by_expert import ByExpert, Stack
from moec.passes.ir.weights import Weight

Steps = Generator[ByExpert, None, dict[str, Any]]


class ExpertStack:
    """A stack [E, N, K] of which one matrix at a time is made. parts: the recipe of each expert."""

    def __init__(self, parts: Sequence[Weight], make: Callable[[Weight], Tensor]) -> None:
        self._parts, self._make = parts, make
        self.shape = (len(parts), *parts[0].shape)

    def __getitem__(self, expert: int, /) -> Tensor:
        return self._make(self._parts[expert])


class Run:
    """One run: done, failed, or stopped at an op under way.

    waits_for: the op.  values: what the run gives, once it is done.  error: why it failed.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self.waits_for: ByExpert | None = None
        self.values: dict[str, Any] | None = None
        self.error: Exception | None = None
        self.go_on()

    def go_on(self) -> None:
        """Runs up to the next op over stacks."""
        self._follow(lambda: next(self._steps))

    def add(self, expert: int, made: dict[Stack, Tensor]) -> None:
        """Gives the op one expert. made: its matrices by stack, filled by what is not there yet."""
        call = self.waits_for
        if call is None or expert not in call.used:
            return
        try:
            for stack in call.stacks:
                if stack not in made:
                    made[stack] = stack[expert]
            call.add(expert, *(made[stack] for stack in call.stacks))
        except Exception as error:
            failure = error  # the name `error` ends with this block
            self._follow(lambda: self._steps.throw(failure))

    def _follow(self, resume: Callable[[], ByExpert]) -> None:
        self.waits_for = None
        try:
            self.waits_for = resume()
        except StopIteration as done:
            self.values = done.value
        except Exception as error:
            self.error = error


def complete(runs: Sequence[Run]) -> None:
    """Takes every run to its end."""
    while waiting := [(run, run.waits_for) for run in runs if run.waits_for is not None]:
        stacks = max((call.stacks for _, call in waiting), key=len)
        together = [(run, call) for run, call in waiting if set(call.stacks) <= set(stacks)]
        for expert in sorted({expert for _, call in together for expert in call.used}):
            _add(expert, [run for run, _ in together])
        for run, call in together:
            if run.waits_for is call:  # it has not failed
                run.go_on()


def _add(expert: int, runs: Sequence[Run]) -> None:
    """A function of its own, so that nothing of an expert is left when the next one is made."""
    made: dict[Stack, Tensor] = {}
    for run in runs:
        run.add(expert, made)
