"""Routed experts that are graphs of ATen operators: each runs on the rows that chose it, expert by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moec.runtime.errors import FormatError
from moec.runtime.launch.states import compiled_body


def expert_graphs(body: dict[str, Any]) -> Callable[..., Tensor]:
    """-> f(x [T,H], weights [T,K], experts [T,K], tensors) -> [T,L]; body as in passes/ir/expert_graphs.py.

    Raises: FormatError: the body cannot be read, or names an operator that this runtime does not have.
    """
    try:
        graphs = [compiled_body(g) for g in body["graphs"]]
        constants = [[int(i) for i in row] for row in body["tensors"]]
        width = int(body["width"])
        graphs = graphs * len(constants) if len(graphs) == 1 else graphs
        if len(graphs) != len(constants):
            raise ValueError(f"{len(graphs)} graphs for {len(constants)} experts")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FormatError(f"program.json: the graphs of experts cannot be read ({error!r})") from error

    def apply(x: Tensor, weights: Tensor, experts: Tensor, tensors: list[Tensor]) -> Tensor:
        slots = experts.shape[1]
        order = experts.reshape(-1).long().sort(stable=True)
        counts = torch.bincount(order.values, minlength=len(graphs)).tolist()[: len(graphs)]
        y = torch.zeros(x.shape[0], width, dtype=torch.float32)
        start = 0
        for graph, used, count in zip(graphs, constants, counts, strict=True):
            chosen = order.indices[start : start + count]
            start += count
            if count:
                rows = chosen // slots
                (z,) = graph(count, x.index_select(0, rows), *[tensors[i] for i in used])
                y.index_add_(0, rows, z.float() * weights.reshape(-1)[chosen, None])
        return y.to(x.dtype)

    return apply
