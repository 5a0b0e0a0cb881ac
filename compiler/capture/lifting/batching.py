"""A program for one row, made into ATen operations on all rows: traced for two numbers of rows, and anti-unified."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from moec.compiler.capture.lifting.program import NotGeneral, Program
from moec.compiler.capture.lifting.trace import ROWS
from moec.passes.ir.body import encode_graph

FEW, MORE = 5, 7  # rows of the two traces


def batched(program: Program, leaves: list[Tensor], hidden: int, dtype: torch.dtype) -> GraphModule:
    """graph(rows [T, H], *leaves) -> the program's value for each row, flat: [T, n].

    Args: leaves: tensors of the program's leaves in order, the row itself left out.
    Raises: NotGeneral: an operation of the program has no form for many rows.
    """

    def one(row: Tensor, given: list[Tensor]) -> Tensor:
        values = iter(given)

        def leaf(name: str, traced: Tensor) -> Tensor:
            return row.reshape(traced.shape).clone() if name == ROWS else next(values)

        return program.run(leaf, 1, dtype).reshape(-1)

    def every(rows: Tensor, *given: Tensor) -> Tensor:
        return torch.vmap(lambda row: one(row, list(given)))(rows)

    pure = torch.func.functionalize(every)
    try:
        with torch.no_grad():
            few, more = (make_fx(pure)(torch.zeros(n, hidden, dtype=dtype), *leaves) for n in (FEW, MORE))
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        first = str(error).splitlines()[0][:120]
        raise NotGeneral(f"a program for one row has no form for many ({first})") from error
    return _unify(few, more)


def _unify(few: GraphModule, more: GraphModule) -> GraphModule:
    """`few` with every integer that follows the number of rows made from the size of its first input."""
    nodes = list(few.graph.nodes)
    if [n.target for n in nodes] != [n.target for n in more.graph.nodes]:
        raise NotGeneral("a program for one row takes other operations for more rows")
    first = next(n for n in nodes if n.op != "placeholder")
    with few.graph.inserting_before(first):
        rows = few.graph.call_function(torch.ops.aten.sym_size.int, (nodes[0], 0))
    for node, other in zip(nodes, more.graph.nodes, strict=True):
        if node.op == "call_function":
            a, spec = tree_flatten((node.args, node.kwargs))
            b = tree_flatten((other.args, other.kwargs))[0]
            with few.graph.inserting_before(node):
                flat = [_size(few, rows, u, v) for u, v in zip(a, b, strict=True)]
            node.args, node.kwargs = tree_unflatten(flat, spec)
    few.recompile()
    return few


def _size(few: GraphModule, rows: Node, a: Any, b: Any) -> Any:
    """a, or slope * rows + offset where the two traces have different integers."""
    if isinstance(a, Node) or a == b:
        return a
    if not isinstance(a, int) or not isinstance(b, int) or (b - a) % (MORE - FEW):
        raise NotGeneral("a program for one row has a number that follows the number of rows in an unknown way")
    slope = (b - a) // (MORE - FEW)
    offset = a - slope * FEW
    size = few.graph.call_function(operator.mul, (rows, slope)) if slope != 1 else rows
    return few.graph.call_function(operator.add, (size, offset)) if offset else size


def body_of(graph: GraphModule) -> dict[str, Any]:
    """A graph of batched() as the body of moec::expert_graphs (see passes/ir/body.py).

    Raises: ValueError: an operation or a size that a body cannot hold.
    """
    nodes = list(graph.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    output = nodes[-1].args[0]
    sizes: dict[Node, int] = {}
    for node in nodes:
        if node.target is torch.ops.aten.sym_size.int:
            sizes[node] = 1
        elif node.target is operator.mul and node.args[0] in sizes:
            sizes[node] = node.args[1]
    kept = [n for n in nodes if n.op not in ("placeholder", "output")]
    return encode_graph(inputs, kept, output, sizes)
