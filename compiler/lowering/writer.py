"""Writes a program's steps: arguments encoded, buffers given out. What kernel bindings and the plain emitter share."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch import fx

from moec.compiler.errors import CompileError
from moec.compiler.lowering.buffers import Buffers, dtype_name
from moec.passes.ir.formats import WeightFormat, parse_format
from moec.passes.ir.quantised import formats_of, stored, stored_formats
from moec.passes.ir.weights import Weight, weight_of
from moec.runtime.expressions import Size
from moec.runtime.program import Step


class UnsupportedOperator(CompileError):
    """A graph node that no step of the runtime can do."""


class Writer:
    """Steps under construction. `steps` is the list that new steps go to; a "choose" swaps it for each variant."""

    def __init__(self, gm: fx.GraphModule, symbols: dict[str, str], device: str = "cpu") -> None:
        self.gm, self.device = gm, device
        self.buffers = Buffers(symbols)
        self.steps: list[Step] = []
        self.weights: dict[str, Weight] = {}
        self.converted: dict[tuple[fx.Node, torch.dtype], dict[str, Any]] = {}
        self._weight_names: dict[Weight, str] = {}
        self._zeros: dict[tuple[str, str, tuple[int, ...]], int] = {}

    def weight_of(self, node: fx.Node) -> Weight | None:
        """The lazy weight that a get_attr node names, None for other nodes."""
        return weight_of(self.gm, node)

    def weight(self, name: str, weight: Weight) -> dict[str, Any]:
        """An argument for a weight; equal weights are stored once, under the first name."""
        name = self._weight_names.setdefault(weight, name)
        self.weights[name] = weight
        return {"buffer": self.buffers.weight(name, weight.shape, weight.dtype)}

    def tensor(self, node: fx.Node) -> dict[str, Any]:
        """An argument for a node's tensor. Weights get a buffer at their first use: unused ones are not stored.

        A quantised weight is stored as it is; a step before this use makes its numbers.
        """
        weight = self.weight_of(node)
        if weight is None:
            return {"buffer": self.buffers.of(node)}
        formats = formats_of(weight)
        if not formats:
            return self.weight(str(node.target), weight)
        made = self.buffers.fresh(f"{node.name}_numbers", "value", node.meta["val"], node)
        constants = {"formats": [format_fields(f) for f in formats], "shape": list(weight.shape)}
        constants["dtype"] = dtype_name(weight.dtype)
        step = Step("library", "stored_weight", node.name, (self.stored(node),), constants, (made,))
        self.steps.append(step)
        return {"buffer": made}

    def formats(self, node: fx.Node) -> tuple[WeightFormat, ...]:
        """The formats in which `stored` keeps a weight: one, or one for each expert."""
        weight = self.weight_of(node)
        assert weight is not None
        return stored_formats(weight)

    def stored(self, node: fx.Node) -> dict[str, Any]:
        """An argument for the bytes of a weight: codes and scales of a quantised one, else its numbers."""
        weight = self.weight_of(node)
        assert weight is not None
        return self.weight(f"{node.target}_stored", stored(weight))

    def dense(self, node: fx.Node, whole: bool = False, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """As `tensor`, in a dtype, and copied first where the last axis (whole: any axis) is not dense in memory."""
        val, argument = node.meta["val"], self.tensor(node)
        if dtype is not None and val.dtype != dtype:
            val = val.to(dtype)
            argument = self._convert(node, val, "aten.to.dtype", (argument, {"dtype": dtype_name(dtype)}))
        fits = val.is_contiguous() if whole else val.dim() == 0 or val.stride(-1) == 1
        if fits:
            return argument
        # not aten.contiguous, which returns an empty tensor as it is, with strides that kernels refuse
        dense = {"memory_format": {"memory_format": "contiguous_format"}}
        return self._convert(node, val, "aten.clone.default", (argument,), dense)

    def _convert(
        self, node: fx.Node, val: torch.Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        made = self.buffers.fresh(f"{node.name}_{name.split('.')[1]}", "value", val, node)
        self.steps.append(Step("aten", name, node.name, args, kwargs or {}, outputs=(made,)))
        return {"buffer": made}

    def filled(self, result: int | None, node: fx.Node, index: int) -> dict[str, Any]:
        """An argument for a result that a kernel writes, scratch memory where nobody reads it."""
        if result is not None:
            return {"buffer": result}
        val = node.meta["val"][index]
        return {"buffer": self.buffers.fresh(f"{node.name}_unread_{index}", "arena", val, node)}

    def scratch(self, name: str, dtype: str, shape: tuple[Size, ...]) -> dict[str, Any]:
        """An argument for memory that one step uses."""
        return {"buffer": self.buffers.add_shape(name, dtype, shape, "arena")}

    def zeros(self, name: str, dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
        """An argument for memory of the whole program that is zero before every step that takes it, and after it.

        Steps run one after the other, so those that ask for the same memory share it.
        """
        key = (name, dtype, shape)
        if key not in self._zeros:
            self._zeros[key] = self.buffers.add_shape(name, dtype, shape, "zeros")
        return {"buffer": self._zeros[key]}

    def results(self, node: fx.Node, kind: str = "value") -> tuple[tuple[int | None, ...], bool]:
        """The buffers of a node's results, None for those that nobody reads; and whether there is a tuple of them."""
        several = node.meta["val"] if isinstance(node.meta["val"], list | tuple) else None
        if several is None:
            return (self.buffers.add(node, kind, node.meta["val"]),), False
        read = {u.args[1] for u in node.users if u.target is operator.getitem and u.users}
        return tuple(self.buffers.add(node, kind, v, i) if i in read else None for i, v in enumerate(several)), True

    def placed(self, node: fx.Node, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a call that also says where its result is: torch would put it on the CPU."""
        parameters = {p.name for p in node.target._schema.arguments}  # type: ignore[union-attr]
        if self.device == "cpu" or "device" not in parameters or "device" in kwargs:
            return kwargs
        follows = any("val" in n.meta and isinstance(n.meta["val"], torch.Tensor) for n in node.all_input_nodes)
        return kwargs if follows else {**kwargs, "device": {"device": self.device}}

    def encode(self, a: Any, node: fx.Node) -> Any:
        """An argument of a node in the form of runtime/program.py. Raises: UnsupportedOperator: no such form."""
        if isinstance(a, fx.Node):
            val = a.meta.get("val")
            if isinstance(val, torch.SymInt):
                return {"size": self.buffers.size(val, node)}
            return val if isinstance(val, int | float | bool) else self.tensor(a)
        if isinstance(a, torch.SymInt):
            return {"size": self.buffers.size(a, node)}
        if isinstance(a, list | tuple):
            return [self.encode(x, node) for x in a]
        if isinstance(a, float) and not math.isfinite(a):
            return {"number": "nan" if math.isnan(a) else "inf" if a > 0 else "-inf"}
        if isinstance(a, torch.dtype):
            return {"dtype": dtype_name(a)}
        if isinstance(a, torch.device):
            return {"device": self.device}
        if isinstance(a, torch.layout | torch.memory_format):
            kind = "layout" if isinstance(a, torch.layout) else "memory_format"
            return {kind: str(a).removeprefix("torch.")}
        if a is None or isinstance(a, bool | int | float | str):
            return a
        raise UnsupportedOperator(f"node {node.name}: argument {a!r} of {node.target} cannot stand in a program")


def format_fields(format: WeightFormat) -> dict[str, Any]:
    """A format as the runtime reads it; see runtime/launch/stored.py. What it reads of bf16-packed is bf16."""
    format = parse_format("bf16") if format.is_packed else format
    fields = dataclasses.asdict(format)
    del fields["wider"]
    return {**fields, "block": list(format.block), "codebook": list(format.codebook)}


def arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by the names of its operator's schema, defaults filled in."""
    given: dict[str, Any] = {}
    for i, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        default = parameter.default_value if parameter.has_default_value() else None
        given[parameter.name] = node.args[i] if i < len(node.args) else node.kwargs.get(parameter.name, default)
    return given


def split_arguments(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """A moec op's arguments by schema: its tensors in order, None where absent, and its non-default constants."""
    tensors: list[Any] = []
    constants: dict[str, Any] = {}
    given = arguments(node)
    for parameter in node.target._schema.arguments:  # type: ignore[union-attr]
        value = given[parameter.name]
        if "Tensor" in str(parameter.type):
            tensors.append(value)
        elif not parameter.has_default_value() or value != parameter.default_value:
            constants[parameter.name] = value
    return tensors, constants
