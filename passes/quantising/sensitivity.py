"""How much a layer's output changes when an expert is stored in a format, measured on calibration inputs.

For every expert the error of both products is measured on the inputs that it gets, for a sample of their outputs, with
the format's own quantiser. Its share in the layer's output is its heat: the sum of squared routing weights. Experts
that few inputs reach are measured on inputs of the whole batch as well, and their heat has a floor, so that what
calibration happened not to choose is not thrown away. The error is relative to the residual stream that the layer adds
to, so that layers can be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from moec.passes.ir.activation import Activation
from moec.passes.ir.evaluate import constants, run_nodes
from moec.passes.ir.formats import FormatError, WeightFormat
from moec.passes.ir.quantise import dequantise_parts, quantise
from moec.passes.ir.quantised import by_expert
from moec.passes.ir.weights import Read, Weight, weights_of
from moec.passes.quantising.layers import ExpertLayer, expert_layers

SAMPLED_ROWS = 96  # outputs of each product on which its error is measured
LEAST_INPUTS = 16  # inputs an expert is measured on, its own or others
MOST_INPUTS = 256
LEAST_HEAT = 0.05  # of the mean


@dataclasses.dataclass(frozen=True)
class ExpertCost:
    """One expert in each format: bytes of both matrices and error; None where a format does not divide its widths.

    values: of both matrices.
    """

    layer: int
    expert: int
    values: int
    options: tuple[tuple[int, float] | None, ...]


@torch.no_grad()
def measure(
    gm: GraphModule, inputs: Sequence[Any], read: Read, formats: Sequence[WeightFormat]
) -> tuple[list[ExpertLayer], list[ExpertCost]]:
    """The layers of experts of a graph and the costs of all their experts; layer is the place in the first list.

    inputs: in placeholder order.  Cost: one evaluation of the graph, and quantising a sample of each expert's rows.
    """
    layers = expert_layers(gm)
    wanted = {name for one in layers for name in one.wanted}
    given = dict(zip((n.name for n in gm.graph.find_nodes(op="placeholder")), inputs, strict=True))
    inner = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    values = run_nodes(inner, given, constants(gm, read), wanted - given.keys()) | given
    costs: list[ExpertCost] = []
    for place, one in enumerate(layers):
        costs += _layer(place, one, weights_of(gm), values, read, formats)
    return layers, costs


def _layer(
    place: int,
    one: ExpertLayer,
    weights: Mapping[str, Weight],
    values: Mapping[str, Any],
    read: Read,
    formats: Sequence[WeightFormat],
) -> list[ExpertCost]:
    x, index = values[one.x.name].float(), values[one.experts.name].long()
    stacks = [by_expert(weights[str(n.target)]) for n in (one.gate_up, one.down)]
    num_routed = len(stacks[0]) - one.num_shared
    heat, rows = _heat(values[one.factors.name].float().reshape(len(x), -1), index, num_routed, one.num_shared)
    scale = values[one.residual.name].float().square().sum(-1).mean().clamp(min=1e-30) * max(len(x), 1)
    biases = [None if n is None else weights[str(n.target)].materialise(read) for n in (one.b_gate_up, one.b_down)]
    floor = LEAST_HEAT * heat.mean()
    costs = []
    for e, (w_in, w_out) in enumerate(zip(*stacks, strict=True)):
        matrices = w_in.materialise(read).float(), w_out.materialise(read).float()
        b_in, b_out = (None if b is None else b[e].float() for b in biases)
        mine = _inputs(x, rows[e])
        h = Activation.parse(one.act)(F.linear(mine, matrices[0], b_in))
        power = F.linear(h, matrices[1], b_out).square().sum(-1).mean() * max(float(heat[e]), float(floor)) / scale
        options = [_option(matrices, (mine, h), f, float(power)) for f in formats]
        costs.append(ExpertCost(place, e, sum(m.numel() for m in matrices), tuple(options)))
    return costs


def _heat(factors: Tensor, index: Tensor, num_routed: int, num_shared: int) -> tuple[Tensor, list[Tensor]]:
    """Of each expert the sum of squared routing weights, and the tokens that reach it."""
    heat = torch.zeros(num_routed + num_shared)
    rows = []
    for e in range(num_routed):
        token, k = (index == e).nonzero(as_tuple=True)
        heat[e] = factors[token, k].square().sum()
        rows.append(token)
    for s in range(num_shared):
        column = index.shape[1] + s
        own = factors[:, column] if factors.shape[1] > column else torch.ones(len(factors))
        heat[num_routed + s] = own.square().sum()
        rows.append(torch.arange(len(factors)))
    return heat, rows


def _inputs(x: Tensor, rows: Tensor) -> Tensor:
    """The inputs to measure an expert on: its own, and others of the batch where they are few."""
    if len(rows) < LEAST_INPUTS:
        others = torch.linspace(0, max(len(x) - 1, 0), min(LEAST_INPUTS, len(x))).long()
        rows = torch.cat([rows, others]).unique()
    return x[rows[:MOST_INPUTS]]


def _option(
    matrices: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor], format: WeightFormat, power: float
) -> tuple[int, float] | None:
    """Bytes and error of one expert in one format: to first order the two products' relative errors add up."""
    try:
        num_bytes = sum(format.matrix_bytes(*m.shape) for m in matrices)
    except FormatError:
        return None
    relative = sum(_relative_error(m, x, format) for m, x in zip(matrices, inputs, strict=True))
    return num_bytes, power * relative


def _relative_error(matrix: Tensor, x: Tensor, format: WeightFormat) -> float:
    """Squared error of x W^T over its square, on a sample of the rows of W."""
    step = -(-len(matrix) // SAMPLED_ROWS)
    some = matrix[::step]
    exact = F.linear(x, some)
    error = F.linear(x, dequantise_parts(quantise(some, format)) - some)
    return float(error.square().sum() / exact.square().sum().clamp(min=1e-30))
