"""Collectives as steps. docs/engine.md says what each step means to the runtime."""

from __future__ import annotations

from typing import Any

from torch import fx

from moec.compiler.lowering.writer import UnsupportedOperator, Writer
from moec.passes.infra.base import layer_of
from moec.passes.infra.rewrite import is_call
from moec.passes.placing.collectives import CONSTANTS, ISSUED, WAIT, c10d, group_name
from moec.passes.placing.exchange import is_sizes
from moec.runtime.program import Step


def is_collective(node: fx.Node) -> bool:
    """Whether a node starts a collective or waits for one."""
    return is_call(node, WAIT, *ISSUED)


def collective_step(writer: Writer, node: fx.Node) -> Step:
    """The step of a collective or of its wait; its result is a value of its own.

    Raises: UnsupportedOperator: an all-to-all whose sizes are not numbers of rows that the graph counts.
    """
    name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
    outputs, _ = writer.results(node)
    if is_call(node, WAIT):
        issued = node.args[0]
        operand = issued.args[0]  # named here so that its memory lives until the collective is over
        return Step("collective", name, node.name, (writer.tensor(issued), writer.tensor(operand)), {}, outputs)
    args, kwargs = [writer.tensor(node.args[0])], dict[str, Any](group=group_name(node))
    if is_call(node, c10d.all_to_all_single.default):
        received, sent = node.args[1:3]
        args += [_counts(writer, sent, node), _counts(writer, received, node)]
    layer = layer_of(node)
    kwargs |= {} if layer is None else {"layer": layer}
    kwargs |= dict(zip(CONSTANTS[node.target], node.args[1:], strict=False))
    return Step("collective", name, node.name, tuple(args), kwargs, outputs)


def _counts(writer: Writer, sizes: Any, node: fx.Node) -> Any:
    """i64[R] numbers of rows; None where each rank sends every other one row."""
    if is_sizes(sizes):
        return writer.tensor(sizes.args[0])
    if isinstance(sizes, list | tuple) and set(sizes) == {1}:
        return None
    raise UnsupportedOperator(f"node {node.name}: the sizes {sizes} of an all-to-all are no counted rows")
