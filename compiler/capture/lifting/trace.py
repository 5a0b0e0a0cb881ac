"""Concrete ATen traces of a block that runs eagerly: every call and every value, with where it came from.

The block runs on ordinary tensors, so .item(), .tolist(), .numpy(), dictionaries and Python loops just work. What is
lost is control dependence: a number that went through the host comes back as a literal. program.py finds such literals
by comparing traces of other rows.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten

from moec.compiler.capture.lifting.held import NARROW
from moec.compiler.capture.tensors import storage_of

RANDOM = (
    "rand",
    "bernoulli",
    "multinomial",
    "normal_",
    "dropout",
    "uniform",
    "exponential",
    "poisson",
    "geometric",
    "cauchy",
)
COMPARE = ("lt", "le", "gt", "ge")
SELECT = ("topk", "sort", "argsort", "argmax", "max", "kthvalue")
KEEP = 1 << 16  # values with more elements are not kept for the search
ROWS = "in:x"  # leaf name of the block's rows
HOST = "<host>"  # leaf name of a tensor that was built outside the trace
ALIAS = "<alias>"  # leaf name of another view of a leaf's storage


def wide(value: Any) -> Any:
    """float64 for a narrow float dtype, and for each one among the arguments of a call; anything else as it is."""
    kind = type(value)
    if kind is torch.dtype:
        return torch.float64 if value in NARROW else value
    if kind is tuple:
        return tuple(map(wide, value)) if torch.dtype in map(type, value) else value
    if kind is dict:
        return {k: wide(v) for k, v in value.items()}
    return value


class IdealArithmetic(TorchDispatchMode):
    """Every request for a narrower float becomes float64; torch.zeros(n) and bool * 0.5 are float64 too.

    A float32 router inside a float64 copy then compares at 1e-15, and no near tie flips.
    """

    def __enter__(self) -> Any:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self._default)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*wide(args), **wide(kwargs or {}))


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor argument inside a recorded call, by number."""

    index: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One recorded call. flat: its arguments as the block gave them (dtypes not widened), tensors as Slots."""

    index: int
    func: Any
    flat: tuple[Any, ...]
    spec: TreeSpec
    outputs: tuple[int, ...]
    writes: tuple[int, ...]

    @property
    def name(self) -> str:
        """The operator without namespace and overload: "mm"."""
        return self.func._schema.name.split("::")[1]


@dataclasses.dataclass(frozen=True)
class Value:
    """The content of a slot just after a step (-1: at the start). taint: leaves that its floats were made from."""

    slot: int
    time: int
    tensor: Tensor
    taint: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """lt, le, gt or ge: its place in the source, the leaves that it depends on, and its outcomes."""

    name: str
    place: tuple[str, int] | None
    taint: frozenset[str]
    outcome: Tensor


class Recorder(IdealArithmetic):
    """Records every ATen call while it is entered.

    Args: leaves: the module's tensors by name.  inputs: the block's inputs by leaf name.
    Gives: steps, values, comparisons, selections (shape and taint of what a top-k or argmax read), random (names of
        calls that draw numbers), literals (small float arguments).
    """

    def __init__(self, leaves: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.objects: list[Tensor] = []  # kept alive, so that id() stays theirs
        self.values: list[Value] = []
        self.comparisons: list[Comparison] = []
        self.selections: list[tuple[tuple[int, ...], frozenset[str]]] = []
        self.random: list[str] = []
        self.literals: dict[float, str] = {}
        self.leaf: dict[int, str] = {}
        self.maker: dict[int, int] = {}
        self.writers: dict[int, list[int]] = {}
        self.output: Any = None
        self._slot_of: dict[int, int] = {}
        self._taint: dict[int, set[str]] = {}
        self._leaf_storage: dict[int, list[str]] = {}
        for name, tensor in [*leaves.items(), *inputs.items()]:
            self._leaf_storage.setdefault(storage_of(tensor), []).append(name)
            self.leaf.setdefault(self._slot(tensor), name)
        self.input_slots = {self._slot_of[id(t)]: name for name, t in inputs.items()}
        for name, tensor in inputs.items():
            self.values.append(Value(self._slot_of[id(tensor)], -1, tensor.detach().clone(), frozenset([name])))

    def storage(self, slot: int) -> int:
        """What tells the memory behind a value from others: views of one tensor share it."""
        return storage_of(self.objects[slot])

    def _slot(self, tensor: Tensor) -> int:
        if id(tensor) in self._slot_of:
            return self._slot_of[id(tensor)]
        slot = self._slot_of[id(tensor)] = len(self.objects)
        self.objects.append(tensor)
        storage = storage_of(tensor)
        if storage not in self._taint:
            self._taint[storage] = set(self._leaf_storage.get(storage, (HOST,)))
        return slot

    def _argument(self, tensor: Tensor) -> int:
        """The slot of an argument; one that no call made came from outside the trace."""
        known = id(tensor) in self._slot_of
        slot = self._slot(tensor)
        if not known:
            self.leaf[slot] = ALIAS if self.storage(slot) in self._leaf_storage else HOST
        return slot

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        recorded = tuple(Slot(self._argument(a)) if isinstance(a, Tensor) else a for a in flat)
        inputs = [a for a in flat if isinstance(a, Tensor)]
        writes = tuple(dict.fromkeys(self._written(func, args, kwargs)))
        result = func(*wide(args), **wide(kwargs))
        outputs = [o for o in tree_flatten(result)[0] if isinstance(o, Tensor)]
        own, every = self._sources(inputs)
        slots = tuple(self._made(o, inputs, own if o.is_floating_point() else every) for o in outputs)
        step = Step(len(self.steps), func, recorded, spec, slots, writes)
        for slot in writes:
            self._taint[self.storage(slot)] |= own
            self.writers.setdefault(self.storage(slot), []).append(step.index)
        self.steps.append(step)
        self._note(step, inputs, outputs, every)
        return result

    def _written(self, func: Any, args: Any, kwargs: Any) -> list[int]:
        """Slots of the arguments that a call writes into."""
        schema = func._schema.arguments
        given = {a.name: v for a, v in zip(schema, args, strict=False)} | kwargs
        writing = [given.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write]
        return [self._slot(v) for v in writing if isinstance(v, Tensor)]

    def _sources(self, inputs: list[Tensor]) -> tuple[set[str], set[str]]:
        """Leaves behind a call's float arguments (else behind any), and behind all of them.

        Integers and booleans carry no taint into floats: else every expert's row would depend on the router.
        """
        every = {n for t in inputs for n in self._taint[storage_of(t)]}
        floats = [t for t in inputs if t.is_floating_point()]
        own = {n for t in floats for n in self._taint[storage_of(t)]} if floats else every
        return own, every

    def _made(self, output: Tensor, inputs: list[Tensor], taint: set[str]) -> int:
        if not any(output is t for t in inputs):
            storage = storage_of(output)
            self._taint.setdefault(storage, set())
            slot = self._slot(output)
            self.maker[slot] = len(self.steps)
        else:
            slot = self._slot_of[id(output)]
        self._taint[self.storage(slot)] |= taint
        return slot

    def _note(self, step: Step, inputs: list[Tensor], outputs: list[Tensor], every: set[str]) -> None:
        for slot in dict.fromkeys((*step.outputs, *step.writes)):
            tensor = self.objects[slot]
            if tensor.numel() <= KEEP:
                taint = frozenset(self._taint[self.storage(slot)])
                self.values.append(Value(slot, step.index, tensor.detach().clone(), taint))
        for literal in step.flat:
            if isinstance(literal, float) and 0 < abs(literal) < 1e4:
                self.literals.setdefault(literal, step.name)
        if any(step.name.startswith(r) for r in RANDOM):
            self.random.append(step.name)
        if step.name in COMPARE and outputs:
            self.comparisons.append(Comparison(step.name, _place(), frozenset(every), outputs[0].detach().clone()))
        if step.name in SELECT and inputs:
            self.selections.append((tuple(inputs[0].shape), frozenset(every)))


LIBRARIES = (torch.__path__[0], __file__, str(Path(__file__).parent.parent / "onnx"))
"""Code that a block calls: torch, this file, and the functions that stand for ONNX operators."""


def _place() -> tuple[str, int] | None:
    """Function and line of the innermost caller outside of LIBRARIES."""
    frame = sys._getframe(2)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(LIBRARIES):
            return frame.f_code.co_name, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None
