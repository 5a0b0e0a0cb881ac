"""From a size to a plan: formats for the experts of a graph, by measured sensitivity."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.fx import GraphModule

from moec.passes.ir.formats import SCALE_NAMES, FormatError, WeightFormat, parse_format
from moec.passes.ir.quantised import stored_formats
from moec.passes.ir.weights import Read, Weight, weights_of
from moec.passes.quantising.budget import choose, together
from moec.passes.quantising.layers import ExpertLayer
from moec.passes.quantising.sensitivity import ExpertCost, measure

FORMATS = ("ternary", "int2-g64", "int2-g32", "int2-g16", "int3-g64", "int3-g32", "int4", "int4-g32", "int8")
"""What is chosen among, beside the model's own dtype."""


@dataclasses.dataclass(frozen=True)
class SizeBudget:
    """What the weights may take. inputs: calibration, in placeholder order.

    num_bytes: of all weights; bits: of a value of the experts, scales included. One of them is given.
    by_layer: all experts of a layer share a format.
    """

    inputs: tuple[Any, ...]
    num_bytes: float | None = None
    bits: float | None = None
    by_layer: bool = False


def experts_within(gm: GraphModule, read: Read | None, budget: SizeBudget) -> dict[str, tuple[WeightFormat, ...]]:
    """Name of a stack of experts -> the format of each of its experts.

    Raises: FormatError: the size is too small, there are no experts, or there are no weights to measure.
    """
    if read is None:
        raise FormatError("formats are chosen by measuring weights; there are none to read")
    weights = weights_of(gm)
    dtypes = {weights[str(n.target)].dtype for n in gm.graph.find_nodes(op="get_attr") if str(n.target) in weights}
    plain = [parse_format(SCALE_NAMES[d]) for d in dtypes if d in SCALE_NAMES]
    formats = [*(parse_format(name) for name in FORMATS), *sorted(plain, key=lambda f: f.bits)[:1]]
    layers, costs = measure(gm, budget.inputs, read, formats)
    if not layers:
        raise FormatError("formats are chosen for experts, and the graph has none whose weights are stored")
    if budget.bits is not None:
        num_bytes = budget.bits / 8 * sum(c.values for c in costs)
    else:
        num_bytes = (budget.num_bytes or 0.0) - _other_bytes(gm, layers)
    return _by_stack(layers, costs, formats, num_bytes, budget.by_layer)


def _by_stack(
    layers: list[ExpertLayer], costs: list[ExpertCost], formats: list[WeightFormat], num_bytes: float, by_layer: bool
) -> dict[str, tuple[WeightFormat, ...]]:
    if by_layer:
        chosen = choose(together(costs), formats, num_bytes)
        each = [[f] * sum(c.layer == i for c in costs) for i, f in enumerate(chosen)]
    else:
        every = choose(costs, formats, num_bytes)
        each = [[f for f, c in zip(every, costs, strict=True) if c.layer == i] for i in range(len(layers))]
    return {str(n.target): tuple(some) for one, some in zip(layers, each, strict=True) for n in (one.gate_up, one.down)}


def _other_bytes(gm: GraphModule, layers: list[ExpertLayer]) -> int:
    """Bytes of every weight that the graph reads and that is no stack of experts; equal ones once."""
    stacks = {str(n.target) for one in layers for n in (one.gate_up, one.down)}
    weights = weights_of(gm)
    read = {str(n.target) for n in gm.graph.find_nodes(op="get_attr")} - stacks
    return sum(map(_stored_bytes, {weights[name] for name in read if name in weights}))


def _stored_bytes(weight: Weight) -> int:
    if len(weight.shape) < 2 or weight.dtype not in SCALE_NAMES:
        return weight.num_bytes
    *lead, rows, columns = weight.shape
    formats = stored_formats(weight)
    count = 1
    for n in lead if len(formats) == 1 else ():
        count *= n
    return count * sum(f.matrix_bytes(rows, columns) for f in formats)
