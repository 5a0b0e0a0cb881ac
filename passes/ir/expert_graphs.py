"""moec::expert_graphs: routed experts that are no gate-up-down MLP, each a graph that runs on its own rows."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from moec.passes.ir.body import run_body


@torch.library.custom_op("moec::expert_graphs", mutates_args=())
def expert_graphs(x: Tensor, weights: Tensor, experts: Tensor, tensors: Sequence[Tensor], body: str) -> Tensor:
    """Each expert's graph on the rows that chose it, summed with their weights.

    x [T,H], weights [T,K], experts int[T,K] -> y [T,L] in x.dtype; an index >= E adds nothing. Sums are in float32,
    rounded once. body: JSON {"graphs": one for all experts or one for each, as in body.py, of rows [n,H] and constants;
    "tensors": for each expert which of `tensors` these constants are; "width": L}.
    Cost: that of the graphs on T*K rows.
    """
    given = json.loads(body)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.zeros(x.shape[0], given["width"], dtype=wide, device=x.device)
    for e in experts.unique().tolist():
        if e < len(given["tensors"]):
            rows, k = (experts == e).nonzero(as_tuple=True)
            graph = given["graphs"][e if len(given["graphs"]) > 1 else 0]
            (z,), _ = run_body(graph, len(rows), [x[rows]], [tensors[i] for i in given["tensors"][e]], [])
            y.index_add_(0, rows, z.to(wide) * weights[rows, k, None].to(wide))
    return y.to(x.dtype)


@expert_graphs.register_fake
def _(x, weights, experts, tensors, body):
    return x.new_empty(x.shape[0], json.loads(body)["width"])
