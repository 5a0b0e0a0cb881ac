"""A replayable slice of a trace: what one value needs, general in the number of rows, in float64 or narrower."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from moec.compiler.capture.lifting.trace import HOST, Recorder, Slot, wide

Leaf = Callable[[str, Tensor], Tensor]


class NotGeneral(Exception):
    """A slice holds for the traced rows only; the message says why."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """The integer a * T + b."""

    a: int
    b: int


@dataclasses.dataclass(frozen=True)
class ProgramStep:
    """One call on numbered values."""

    func: Any
    flat: tuple[Any, ...]
    spec: TreeSpec
    outputs: tuple[int, ...]

    def shape(self) -> tuple[Any, ...]:
        """What two traces of the same code share: the operation, which tensors, the types of the literals."""
        kinds = tuple(("T", a.index) if isinstance(a, Slot) else type(a).__name__ for a in self.flat)
        return self.func, kinds, str(self.spec), self.outputs


@dataclasses.dataclass
class Program:
    """Steps in order; leaves are values 0.. by name, and the tensors that they were in the trace."""

    leaf_names: list[str]
    leaf_tensors: list[Tensor]
    steps: list[ProgramStep]
    result: int
    writes_leaf: bool

    def signature(self) -> list[tuple[Any, ...]]:
        """The steps' shapes: equal where two programs run the same code on other tensors."""
        return [s.shape() for s in self.steps]

    def run(self, leaf: Leaf, num_rows: int | Any, dtype: torch.dtype) -> Tensor:
        """Replays. leaf: gives the tensor of a leaf.  dtype: float64 widens every float, others stand as recorded."""
        values: dict[int, Any] = {
            i: leaf(n, t) for i, (n, t) in enumerate(zip(self.leaf_names, self.leaf_tensors, strict=True))
        }
        for step in self.steps:
            flat = [_argument(a, values, num_rows, dtype) for a in step.flat]
            args, kwargs = tree_unflatten(flat, step.spec)
            made = step.func(*args, **kwargs)
            tensors = [v for v in tree_flatten(made)[0] if isinstance(v, Tensor)]
            values.update(zip(step.outputs, tensors, strict=True))
        return values[self.result]


def _argument(value: Any, values: Mapping[int, Any], num_rows: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Slot):
        return values[value.index]
    if isinstance(value, Linear):
        return value.a * num_rows + value.b
    if dtype == torch.float64:
        return wide(value)
    # float64 in a recording means "the dtype of the rows": the copy that was traced is float64
    return dtype if isinstance(value, torch.dtype) and value == torch.float64 else value


def needed(recorder: Recorder, slot: int, time: int, cut: Mapping[int, str]) -> tuple[list[int], set[int]]:
    """Steps that the content of `slot` just after step `time` needs, and the leaf slots that they read.

    cut: slots that count as inputs, with their leaf names.
    """
    steps: set[int] = set()
    leaves: set[int] = set()
    todo, seen = [(slot, time)], set()
    while todo:
        at = todo.pop()
        if at in seen or at[0] in cut:
            continue
        seen.add(at)
        s, t = at
        makers = [recorder.maker[s]] if s in recorder.maker and recorder.maker[s] <= t else []
        if s in recorder.leaf:
            leaves.add(s)
        makers += [j for j in recorder.writers.get(recorder.storage(s), ()) if j <= t]
        for j in makers:
            if j not in steps:
                steps.add(j)
                todo += [(a.index, j - 1) for a in recorder.steps[j].flat if isinstance(a, Slot)]
    return sorted(steps), leaves


def program_of(recorder: Recorder, slot: int, time: int, cut: Mapping[int, str] | None = None) -> Program:
    """The slice of one value as a program; leaves are numbered in order of first use."""
    cut = cut or {}
    order, leaves = needed(recorder, slot, time, cut)
    number: dict[int, int] = {}
    names: list[str] = []
    tensors: list[Tensor] = []
    used = [a.index for j in order for a in recorder.steps[j].flat if isinstance(a, Slot)]
    for s in dict.fromkeys([*used, slot]):
        if s in cut or s in leaves:
            number[s] = len(number)
            names.append(cut.get(s) or recorder.input_slots.get(s) or recorder.leaf[s])
            tensors.append(recorder.objects[s])
    steps, writes_leaf = [], False
    for j in order:
        step = recorder.steps[j]
        flat = tuple(Slot(number[a.index]) if isinstance(a, Slot) else a for a in step.flat)
        outputs = tuple(number.setdefault(o, len(number)) for o in step.outputs)
        steps.append(ProgramStep(step.func, flat, step.spec, outputs))
        writes_leaf |= any(w in leaves and w not in recorder.input_slots and w not in cut for w in step.writes)
    return Program(names, tensors, steps, number[slot], writes_leaf)


def generalise(first: Program, same: Program, other: Program, num_rows: int, num_other: int) -> Program:
    """Anti-unifies three programs: `first` (T rows), `same` (T other rows), `other` (another number of rows).

    A literal that is equal in all stays; one that differs with T becomes a * T + b.
    Raises: NotGeneral: the operations or the tensors differ, or a literal follows the data.
    """
    for program in (same, other):
        if first.signature() != program.signature():
            raise NotGeneral(f"the operations differ between two runs ({len(first.steps)}, {len(program.steps)})")
        if first.leaf_names != program.leaf_names:
            raise NotGeneral("the tensors read differ between two runs")
    for name, a, b in zip(first.leaf_names, first.leaf_tensors, same.leaf_tensors, strict=True):
        if name == HOST and not (a.shape == b.shape and torch.equal(a, b)):
            raise NotGeneral("a tensor was built on the host from data")
    steps = []
    for s, t, o in zip(first.steps, same.steps, other.steps, strict=True):
        flat = tuple(
            _unified(s.func, u, v, w, num_rows, num_other) for u, v, w in zip(s.flat, t.flat, o.flat, strict=True)
        )
        steps.append(dataclasses.replace(s, flat=flat))
    return dataclasses.replace(first, steps=steps)


def _unified(func: Any, a: Any, same: Any, other: Any, num_rows: int, num_other: int) -> Any:
    if isinstance(a, Slot | torch.dtype | torch.layout | torch.device | torch.memory_format):
        return a
    if a != same and not (a != a and same != same):
        raise NotGeneral(f"{func} has a literal that follows the data ({a} and {same})")
    if a == other or (a != a and other != other):
        return a
    if not isinstance(a, int) or num_other == num_rows or (other - a) % (num_other - num_rows):
        raise NotGeneral(f"{func} has a literal that follows the number of rows in an unknown way")
    slope = (other - a) // (num_other - num_rows)
    return Linear(slope, a - slope * num_rows)
