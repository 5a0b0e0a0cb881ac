"""Numbers for the symbolic sizes of a probe; probes in parts where no size is symbolic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from moec.passes.infra.rewrite import FIRST_IS_TEMPLATE, symbolic


def bind(shape: Iterable[Any], rows: int) -> dict[str, int]:
    """Symbol values that give a value of this shape `rows` rows: the last symbol gets them all, others are 1."""
    exprs = [symbolic(s) for s in shape]
    symbols = dict.fromkeys(str(x) for e in exprs for x in sorted(getattr(e, "free_symbols", ()), key=str))
    return {s: rows if s == list(symbols)[-1] else 1 for s in symbols}


def number(size: Any, values: Mapping[str, int]) -> int:
    """A size with its symbols replaced."""
    expr = symbolic(size)
    return expr if isinstance(expr, int) else int(expr.subs({x: values[str(x)] for x in expr.free_symbols}))


def like(node: Node, values: Mapping[str, int]) -> Any:
    """Zeros of a node's shape and dtype; a number for a size; what a filling (full_like) holds."""
    val = node.meta["val"]
    if node.target in FIRST_IS_TEMPLATE:
        args = map_arg(node.args, lambda n: like(n, values))
        return node.target(*args, **{k: v for k, v in node.kwargs.items() if k == "dtype"})  # type: ignore[operator]
    if not isinstance(val, Tensor):
        return number(val, values)
    return torch.zeros([number(s, values) for s in val.shape], dtype=val.dtype)


def in_parts(rows: Tensor, shape: Iterable[Any]) -> list[Tensor]:
    """Probe rows [R, n] as a value of this shape takes them: all at once where a size is symbolic, else part by part.

    The last part is filled up with rows from the front.
    """
    sizes = [symbolic(s) for s in shape]
    if any(not isinstance(s, int) for s in sizes):
        return [rows]
    each = max(1, torch.Size(sizes[:-1]).numel())
    missing = -len(rows) % each
    filled = torch.cat([rows, *([rows] * -(-missing // len(rows)))])[: len(rows) + missing]
    return list(filled.split(each))


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Values of several runs as those of one: tensors one behind the other on the axis of rows (last but one)."""
    if len(parts) == 1:
        return parts[0]

    def join(values: list[Any]) -> Any:
        if not isinstance(values[0], Tensor) or values[0].dim() == 0:
            return values[0]
        return torch.cat(values, max(0, values[0].dim() - 2))

    return {name: join([part[name] for part in parts]) for name in parts[0]}
