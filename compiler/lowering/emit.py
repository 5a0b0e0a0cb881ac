"""From a graph to a program: one step per call, sizes resolved to expressions, buffers freed at their last use."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from moec.compiler.capture.captured import Captured
from moec.compiler.errors import CompileError
from moec.compiler.lowering.buffers import Buffers, dtype_name
from moec.passes.ir.weights import Weight, weights_of
from moec.runtime.launch.aten import is_allowed
from moec.runtime.launch.library import LIBRARY
from moec.runtime.program import Program, Step, buffers_in


@dataclasses.dataclass(frozen=True)
class Lowered:
    """program: for one rank.  weights: buffer name -> how to make it, in the order of first use."""

    program: Program
    weights: dict[str, Weight]


def lower(captured: Captured) -> Lowered:
    """The program of a captured (and usually rewritten) graph.

    Raises: UnsupportedOperator: a node that the runtime has no step for.
    """
    return _Emitter(captured.graph_module, captured.symbols).lower()


class UnsupportedOperator(CompileError):
    """A graph node that no step of the runtime can do."""


class _Emitter:
    def __init__(self, gm: fx.GraphModule, symbols: dict[str, str]) -> None:
        self.gm = gm
        self.buffers = Buffers(symbols)
        self.weights: dict[str, Weight] = {}
        self._names: dict[Weight, str] = {}
        self.steps: list[Step] = []

    def lower(self) -> Lowered:
        inputs: list[int] = []
        outputs: list[int] = []
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                inputs.append(self.buffers.add(node, "input", node.meta["val"]))
            elif node.op == "get_attr":
                self._weight(node)
            elif node.op == "output":
                outputs = self._outputs(node)
            elif node.op == "call_function":
                self._call(node)
            else:
                raise UnsupportedOperator(f"node {node.name}: {node.op} {node.target} cannot be a step of a program")
        used = tuple(sorted({self.buffers.symbols[s] for s in self._bound_symbols(inputs)}))
        program = Program(used, tuple(self.buffers.all), tuple(inputs), tuple(outputs), ())
        return Lowered(dataclasses.replace(program, steps=free_dead(program, self.steps)), self.weights)

    def _outputs(self, node: fx.Node) -> list[int]:
        values = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
        return [self.buffers.of(v) for v in values]

    def _bound_symbols(self, inputs: Sequence[int]) -> list[str]:
        """sympy names of the symbols that are a dimension of an input: the ones that the runtime can know."""
        shapes = [d for i in inputs for d in self.buffers.all[i].shape]
        return [s for s, name in self.buffers.symbols.items() if name in shapes]

    def _weight(self, node: fx.Node) -> None:
        weight = weights_of(self.gm).get(node.target)
        if weight is None:
            raise UnsupportedOperator(f"node {node.name}: the attribute {node.target} is no weight of the graph")
        name = self._names.setdefault(weight, node.target)
        self.weights[name] = weight
        self.buffers.add_weight(node, name, node.meta["val"])

    def _call(self, node: fx.Node) -> None:
        val = node.meta.get("val")
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            if _tensors(node.args[0].meta.get("val")) is not None:
                self.buffers.alias(node, node.args[0], node.args[1])
            return
        if isinstance(val, int | float | bool | torch.SymInt):
            return  # sizes are expressions where they are used
        if not isinstance(node.target, torch._ops.OpOverload):
            raise UnsupportedOperator(f"node {node.name}: {node.target} cannot be a step of a program")
        namespace, name = node.target._schema.name.split("::")
        if namespace == "moec":
            self._library(node, name)
        elif namespace == "aten" and is_allowed(f"aten.{name}.{node.target._overloadname}"):
            self._aten(node, f"aten.{name}.{node.target._overloadname}")
        else:
            raise UnsupportedOperator(
                f"node {node.name}: {node.target} is not on the runtime's list of operators (runtime/launch/aten.py)"
            )

    def _aten(self, node: fx.Node, name: str) -> None:
        args = tuple(self._encode(a, node) for a in node.args)
        kwargs = {k: self._encode(v, node) for k, v in node.kwargs.items() if v is not None and k != "pin_memory"}
        self.steps.append(Step("aten", name, node.name, args, kwargs, *self._results(node)))

    def _library(self, node: fx.Node, name: str) -> None:
        if name not in LIBRARY:
            raise UnsupportedOperator(f"node {node.name}: the runtime has no library kernel for moec::{name}")
        tensors, constants = split_arguments(node)
        args = tuple(self._encode(a, node) for a in tensors)
        self.steps.append(Step("library", name, node.name, args, constants, *self._results(node)))

    def _results(self, node: fx.Node) -> tuple[tuple[int | None, ...], bool]:
        """The buffers of a node's results, None for those that nobody reads; and whether there is a tuple of them."""
        several = _tensors(node.meta["val"])
        if several is None:
            return (self.buffers.add(node, "value", node.meta["val"]),), False
        read = {u.args[1] for u in node.users if u.target is operator.getitem and u.users}
        return tuple(self.buffers.add(node, "value", v, i) if i in read else None for i, v in enumerate(several)), True

    def _encode(self, a: Any, node: fx.Node) -> Any:
        if isinstance(a, fx.Node):
            val = a.meta.get("val")
            if isinstance(val, torch.SymInt):
                return {"size": self.buffers.size(val, node)}
            return val if isinstance(val, int | float | bool) else {"buffer": self.buffers.of(a)}
        if isinstance(a, torch.SymInt):
            return {"size": self.buffers.size(a, node)}
        if isinstance(a, list | tuple):
            return [self._encode(x, node) for x in a]
        if isinstance(a, float) and not math.isfinite(a):
            return {"number": "nan" if math.isnan(a) else "inf" if a > 0 else "-inf"}
        if isinstance(a, torch.dtype):
            return {"dtype": dtype_name(a)}
        if isinstance(a, torch.device):
            return {"device": "cpu"}
        if isinstance(a, torch.layout | torch.memory_format):
            kind = "layout" if isinstance(a, torch.layout) else "memory_format"
            return {kind: str(a).removeprefix("torch.")}
        if a is None or isinstance(a, bool | int | float | str):
            return a
        raise UnsupportedOperator(f"node {node.name}: argument {a!r} of {node.target} cannot stand in a program")


def split_arguments(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """A moec op's arguments by schema: its tensors in order, None where absent, and its non-default constants."""
    tensors: list[Any] = []
    constants: dict[str, Any] = {}
    for i, parameter in enumerate(node.target._schema.arguments):
        default = parameter.default_value if parameter.has_default_value() else None
        value = node.args[i] if i < len(node.args) else node.kwargs.get(parameter.name, default)
        if "Tensor" in str(parameter.type):
            tensors.append(value)
        elif not parameter.has_default_value() or value != default:
            constants[parameter.name] = value
    return tensors, constants


def free_dead(program: Program, steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps with `dies` set: values that the runtime allocates are dropped after their last use."""
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        for b in [*_reads(step), *(o for o in step.outputs if o is not None)]:
            last[b] = i
    kept = set(program.outputs)
    deaths: dict[int, list[int]] = {}
    for b, i in sorted(last.items()):
        if program.buffers[b].kind == "value" and b not in kept:
            deaths.setdefault(i, []).append(b)
    return tuple(dataclasses.replace(s, dies=tuple(deaths.get(i, ()))) for i, s in enumerate(steps))


def _reads(step: Step) -> list[int]:
    inner = [b for _, steps in step.variants for s in steps for b in _reads(s)]
    return [*buffers_in(step.args), *buffers_in(list(step.kwargs.values())), *inner]


def _tensors(val: Any) -> Sequence[torch.Tensor] | None:
    """The tensors of a node with several results, else None."""
    return val if isinstance(val, list | tuple) else None
