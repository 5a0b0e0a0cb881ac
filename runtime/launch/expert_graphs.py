"""Routed experts that are graphs of ATen operators: each runs on the rows that chose it, expert by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moec.runtime.errors import FormatError
from moec.runtime.launch.experts import summed
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
        def one(e: int, rows: Tensor) -> Tensor:
            (z,) = graphs[e](len(rows), rows, *[tensors[i] for i in constants[e]])
            return z

        return summed(one, x, weights, experts.long(), len(graphs), width=width)

    return apply
