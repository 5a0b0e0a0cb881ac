"""Training FLOPs of 4096 tokens by the rule that the DeepSeekMoE paper counts with, from the shapes of a graph.

    FLOPs = T * (6 * sum over layers of (4 d^2 + A) + 12 L d T + 6 V d)        T = 4096 tokens, one sequence

d is the hidden width, V the vocabulary, L the number of layers and A the parameters of a layer's feed-forward networks
that a token meets. By that rule attention has 4 d^2 parameters whatever its heads share, it looks at all T tokens, the
router, norms and the embedding cost nothing, and the dense layers before the first layer with experts count as if they
had experts. Forward alone is a third.

The paper's tables count most networks at the width before it was rounded up for the hardware: 8/3 d / m for a network
cut in m, which is 2/3 * 4 d for m = 1. So both counts are given. Source: DeepSeekMoE, tables 1, 3, 4 and 6.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from moec.passes.ir import ops

TOKENS = 4096
EXPERTS = ops.experts._opoverload
LARGEST_ROUNDING = 256
"""The widths of published models are multiples of at most this."""

_aten = torch.ops.aten
LINEAR = _aten.linear.default
_BETWEEN = frozenset(
    {
        _aten.mul.Tensor, _aten.silu.default, _aten.gelu.default, _aten.relu.default, _aten.sigmoid.default,
        _aten.tanh.default, _aten.pow.Tensor_Scalar, _aten.clamp.default, _aten.add.Scalar, _aten.to.dtype,
        _aten.chunk.default, _aten.split.Tensor, _aten.slice.Tensor, _aten.view.default, _aten.reshape.default,
        operator.getitem,
    }
)  # fmt: skip
"""What may stand between the first and the last product of a feed-forward network."""


def flops_per_4k_tokens(graph: Graph, hidden: int, layers: int, vocabulary: int) -> dict[str, int] | None:
    """{"training": at the model's own widths, "training_unrounded": at the widths before rounding up}.

    graph: as captured, one moec::experts node for the experts of a layer. None: no layer has a feed-forward network
    that is seen as one.
    """
    networks: dict[int, list[tuple[float, int, float]]] = {}
    sparse = []
    for node in graph.find_nodes(op="call_function", target=EXPERTS):
        networks.setdefault(node.meta["layer"], []).append(_of_experts(node))
        sparse.append(node.meta["layer"])
    for down in graph.find_nodes(op="call_function", target=LINEAR):
        found = _of_linear(down)
        if found is not None:
            networks.setdefault(down.meta["layer"], []).append(found)
    if not networks or not hidden:
        return None
    for dense in range(min(sparse, default=0)):
        networks[dense] = networks[min(sparse)]
    own, unrounded = 0.0, 0.0
    for count, width, per_column in (n for listed in networks.values() for n in listed):
        own += count * width * per_column
        unrounded += count * _unrounded(width, hidden) * per_column
    rest = 12 * layers * hidden * TOKENS + 6 * vocabulary * hidden + 6 * layers * 4 * hidden**2
    return {
        "training": round(TOKENS * (6 * own + rest)),
        "training_unrounded": round(TOKENS * (6 * unrounded + rest)),
    }


def _of_experts(node: Node) -> tuple[float, int, float]:
    """How many networks a token meets, the width of one, and its parameters for each column of that width."""
    first, last = _shape(node.args[3]), _shape(node.args[4])  # [E, F, H] and [E, H, F], either may be transposed
    width = last[1] * last[2] // _shape(node.args[0])[-1]
    return float(_shape(node.args[2])[1]), width, (first[1] * first[2] + last[1] * last[2]) / width


def _of_linear(down: Node) -> tuple[float, int, float] | None:
    """The same of a dense network, by its last product; None where this product is not the last of one."""
    layer, (hidden, width) = down.meta.get("layer"), _shape(down.args[1])
    if layer is None:
        return None
    firsts = _products_before(down)
    if firsts is None or any(f.meta.get("layer") != layer or _shape(f.args[1])[1] != hidden for f in firsts):
        return None
    rows = sum(_shape(f.args[1])[0] for f in firsts)
    if rows not in (width, 2 * width):
        return None
    return 1.0, width, hidden * (rows + width) / width


def _products_before(down: Node) -> list[Node] | None:
    """The products that its input is made of by elementwise operations; None where something else stands between."""
    found: dict[Node, None] = {}
    left = [down.args[0]]
    while left:
        node = left.pop()
        if not isinstance(node, Node):
            return None
        if node.target is LINEAR:
            found[node] = None
        elif node.target in _BETWEEN:
            left += [a for a in node.all_input_nodes if not isinstance(a.meta.get("val"), torch.SymInt)]
        else:
            return None
    return list(found) or None


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _unrounded(width: int, hidden: int) -> float:
    """8/3 hidden / m, where the width is that rounded up to a multiple of at most LARGEST_ROUNDING; else the width."""
    standard = 8 * hidden / 3
    parts = round(standard / width)
    if parts == 0:
        return width
    exact = standard / parts
    return exact if 0 <= width - exact < min(LARGEST_ROUNDING, exact / 16) else width
