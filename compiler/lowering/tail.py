"""The tail of a language model: from the output projection on, only the rows that somebody wants are computed.

A prefill of T tokens needs the logits of one row per sequence, and the output projection is the widest layer. So the
program of a language model has one more input, `rows` i64[R], in front of its last linear layer; its logits are [R, V].
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
ROWS, ROWS_SYMBOL, TOKENS_SYMBOL = "rows", "R", "T"
ELEMENTWISE = (
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.tanh.default,
    aten.to.dtype,
    aten._to_copy.default,
)


def output_tail(graph: fx.Graph) -> list[fx.Node]:
    """The nodes from the last linear layer to the graph's one output, in order; empty where they are not such a chain.

    Every node of the chain treats rows independently and is read by the next alone.
    """
    values = graph.output_node().args[0]
    node = values[0] if isinstance(values, list | tuple) and len(values) == 1 else values
    tail: list[fx.Node] = []
    while isinstance(node, fx.Node) and len(node.users) == 1:
        tail.append(node)
        if node.target is aten.linear.default:
            return tail[::-1] if node.args[0].meta["val"].dim() == 2 else []
        sources = node.all_input_nodes
        if node.target not in ELEMENTWISE or len(sources) != 1:
            return []
        node = sources[0]
    return []
