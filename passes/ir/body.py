"""The body of a moec::recurrence: what it computes in one step, as JSON that the graph, its text and programs carry.

    {"inputs": 2, "constants": 1, "states": 1,
     "steps": [["aten.exp.default", [{"value": 0}], {}], ["aten.mul.Tensor", [{"value": 3}, {"value": 4}], {}], ..],
     "outputs": [7], "new_states": [6], "types": [["float32", [4, 8]]]}

Values are numbered: inputs, constants, states, then the result of each step. Inputs, states, outputs and new states
have one row for each sequence of the step: {"rows": 4} is four times their number. types: dtype and shape of a row of
each output. A step is an ATen operator, or "getitem" of a result of several.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

GETITEM = "getitem"
_NAMED = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}


def encode_body(
    inputs: Sequence[Node],
    constants: Sequence[Node],
    states: Sequence[Node],
    nodes: Sequence[Node],
    outputs: Sequence[Node],
    new_states: Sequence[Node],
    rows: Any,
) -> str:
    """The body that computes `nodes`, in order. rows: the expression of the number of rows among their sizes.

    Raises: ValueError: an operator that is not ATen, or a size that is no multiple of the rows.
    """
    given = [*inputs, *constants, *states]
    number = {n: i for i, n in enumerate([*given, *nodes])}

    def size(node: Node) -> int | None:
        return _multiple(node, rows) if isinstance(node.meta.get("val"), torch.SymInt) else None

    steps = _steps(nodes, number, size)
    values = [n.meta["val"] for n in outputs]
    body = {
        "inputs": len(inputs),
        "constants": len(constants),
        "states": len(states),
        "steps": steps,
        "outputs": [number[n] for n in outputs],
        "new_states": [number[n] for n in new_states],
        "types": [[str(v.dtype).removeprefix("torch."), [int(d) for d in v.shape[1:]]] for v in values],
    }
    return json.dumps(body)


def encode_graph(inputs: Sequence[Node], nodes: Sequence[Node], output: Node, sizes: dict[Node, int]) -> dict[str, Any]:
    """A body without states that computes `nodes`, in order: one input with rows, the others are constants.

    sizes: nodes that are a multiple of the number of rows. Raises: ValueError: as encode_body.
    """
    computed = [n for n in nodes if n not in sizes]
    number = {n: i for i, n in enumerate([*inputs, *computed])}
    return {
        "inputs": 1,
        "constants": len(inputs) - 1,
        "states": 0,
        "steps": _steps(computed, number, sizes.get),
        "outputs": [number[output]],
        "new_states": [],
    }


def _steps(nodes: Sequence[Node], number: dict[Node, int], size: Callable[[Node], int | None]) -> list[Any]:
    return [
        [_operator_name(n), [_encode(a, number, size) for a in n.args], _encode(dict(n.kwargs), number, size)]
        for n in nodes
    ]


def _multiple(node: Node, rows: Any) -> int:
    times = node.meta["val"].node.expr / rows
    if not times.is_Integer:
        raise ValueError(f"the size {node.name} = {node.meta['val']} is no multiple of the number of rows")
    return int(times)


def _operator_name(node: Node) -> str:
    if node.target is operator.getitem:
        return GETITEM
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        raise ValueError(f"{node.name}: {node.target} is no ATen operator")
    return str(node.target)


def _encode(a: Any, number: dict[Node, int], size: Callable[[Node], int | None]) -> Any:
    if isinstance(a, Node) and size(a) is not None:
        return {"rows": size(a)}
    if isinstance(a, Node):
        return {"value": number[a]}
    if isinstance(a, dict):
        return {k: _encode(v, number, size) for k, v in a.items() if v is not None and k != "pin_memory"}
    if isinstance(a, list | tuple):
        return [_encode(x, number, size) for x in a]
    if isinstance(a, torch.device):
        return {"device": "cpu"}
    for kind, name in _NAMED.items():
        if isinstance(a, kind):
            return {name: str(a).removeprefix("torch.")}
    if isinstance(a, float) and not math.isfinite(a):
        return {"number": str(a)}
    if a is None or isinstance(a, bool | int | float | str):
        return a
    raise ValueError(f"the argument {a!r} cannot stand in the body of a recurrence")


def run_body(
    body: dict[str, Any], rows: int, inputs: Sequence[Tensor], constants: Sequence[Tensor], states: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """One step of `rows` sequences -> outputs, new states."""
    values: list[Any] = [*inputs, *constants, *states]
    for name, args, kwargs in body["steps"]:
        decoded = [_decode(a, values, rows) for a in args]
        named = {k: _decode(a, values, rows) for k, a in kwargs.items()}
        values.append(_operator(name)(*decoded, **named))
    return [values[i] for i in body["outputs"]], [values[i] for i in body["new_states"]]


def _operator(name: str) -> Callable[..., Any]:
    if name == GETITEM:
        return operator.getitem
    _, packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def _decode(a: Any, values: Sequence[Any], rows: int) -> Any:
    if isinstance(a, list):
        return [_decode(x, values, rows) for x in a]
    if not isinstance(a, dict):
        return a
    ((kind, content),) = a.items()
    if kind == "value":
        return values[content]
    if kind == "rows":
        return content * rows
    if kind == "number":
        return float(content)
    return torch.device(content) if kind == "device" else getattr(torch, content)
