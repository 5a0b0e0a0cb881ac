"""The tail of a language model: from the output projection on, only the rows that somebody wants are computed.

A prefill of T tokens needs the logits of one row per sequence, and the output projection is the widest layer. So the
program of a language model has one more input, `rows` i64[R], in front of its last linear layer; its logits are [R, V].
"""

from __future__ import annotations

import torch
from torch import fx

from moec.compiler.lowering.collectives import is_collective

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


JOINS = (
    aten.slice.Tensor,
    aten.select.int,
    aten.zeros_like.default,
    aten.expand.default,
    aten.cat.default,
    aten.view.default,
    aten.sym_size.int,
)
"""How the parts of the logits that ranks compute are joined (passes/placing): row by row too."""


def output_tail(graph: fx.Graph) -> list[fx.Node]:
    """The nodes from the last linear layer to the graph's one output, in order; empty where rows meet on the way.

    Every node treats rows independently, and nothing else reads any of them.
    """
    values = graph.output_node().args[0]
    node = values[0] if isinstance(values, list | tuple) and len(values) == 1 else values
    linears = graph.find_nodes(op="call_function", target=aten.linear.default)
    if not linears or not isinstance(node, fx.Node) or linears[-1].args[0].meta["val"].dim() != 2:
        return []
    last = linears[-1]
    tail = {last: None}
    at = last.next
    while at.op != "output":
        if any(p in tail for p in at.all_input_nodes):
            rowwise = at.target in (*ELEMENTWISE, *JOINS) or is_collective(at)
            if not rowwise or any(p not in tail for p in at.all_input_nodes):
                return []
            tail[at] = None
        at = at.next
    return list(tail) if node in tail and all(n.users for n in tail) else []
