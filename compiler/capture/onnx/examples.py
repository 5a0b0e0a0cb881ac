"""Inputs to run a graph on: sizes for its open dimensions, and values that its lookups can take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from moec.compiler.capture.compare import resized
from moec.compiler.capture.onnx.graph import Graph, Input, Size
from moec.compiler.errors import CompileError

FIRST = (2, 5, 7, 3, 11, 13)
SECOND = (3, 7, 4, 2, 5, 6)
"""Sizes of the open dimensions in the order in which they occur; others than those of the weights, most likely."""
_TERM = re.compile(r"\s*\+\s*")


def open_dimensions(graph: Graph) -> list[str]:
    """The names of dimensions that are open, sums taken apart ("past + new" has two), in order of their first use."""
    names: dict[str, None] = {}
    for size in (s for i in graph.inputs for s in i.shape if isinstance(s, str)):
        names.update(dict.fromkeys(t for t in terms(size) if not t.isdecimal()))
    return list(names)


def terms(size: str) -> list[str]:
    """The terms of a sum."""
    return _TERM.split(size.strip())


def sizes_for(graph: Graph, numbers: Sequence[int]) -> dict[str, int]:
    """numbers for the open dimensions in the order of their first use; further ones get 3, 4, .. by their place."""
    names = open_dimensions(graph)
    return {n: numbers[i] if i < len(numbers) else 3 + i for i, n in enumerate(names)}


def number(size: Size, sizes: Mapping[str, int]) -> int:
    """A size with its names filled in; "past + new" is a sum."""
    if isinstance(size, int):
        return size
    return sum(int(t) if t.isdecimal() else sizes[t] for t in terms(size))


def make_inputs(graph: Graph, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Random rows, token numbers that an embedding has, masks of ones, and positions that count up."""
    generator = torch.Generator().manual_seed(20261122)
    return {i.name: _made(graph, i, tuple(number(s, sizes) for s in i.shape), generator) for i in graph.inputs}


def _made(graph: Graph, given: Input, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if given.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(given.dtype)
    name = given.name.lower()
    if given.dtype is torch.bool or "mask" in name:
        return torch.ones(shape, dtype=given.dtype)
    if "position" in name and shape:
        return torch.arange(shape[-1]).expand(shape).contiguous().to(given.dtype)
    return torch.randint(0, _bound(graph, given.name), shape, generator=generator).to(given.dtype)


def _bound(graph: Graph, name: str) -> int:
    """How many rows the smallest table has that is looked up by an input."""
    same = {name}
    tables: list[int] = []
    for node in graph.nodes:
        if node.op in ("Cast", "Identity", "Reshape", "Unsqueeze") and node.inputs[0] in same:
            same.update(node.outputs)
        if node.op == "Gather" and len(node.inputs) == 2 and node.inputs[1] in same:
            table = graph.constants.get(node.inputs[0])
            tables += [] if table is None or node.attributes.get("axis", 0) else [int(table.shape[0])]
    return max(1, min(tables, default=8))


def given_inputs(graph: Graph, values: Iterable[Tensor]) -> dict[str, Tensor]:
    """The user's example inputs by name. Raises: CompileError: other inputs than the graph has."""
    found = list(values)
    if len(found) != len(graph.inputs):
        named = ", ".join(i.name for i in graph.inputs)
        raise CompileError(f"{graph.name}: {len(found)} example inputs; expected {len(graph.inputs)}: {named}")
    for value, wanted in zip(found, graph.inputs, strict=True):
        fits = isinstance(value, Tensor) and value.dtype == wanted.dtype and value.dim() == len(wanted.shape)
        if not fits:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise CompileError(
                f"{graph.name}: example input {wanted.name} is {shape}; expected {wanted.dtype} {list(wanted.shape)}"
            )
    return {i.name: v for i, v in zip(graph.inputs, found, strict=True)}


def sizes_of(graph: Graph, values: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of open dimensions that values have."""
    found: dict[str, int] = {}
    for given in graph.inputs:
        for size, actual in zip(given.shape, values[given.name].shape, strict=True):
            if isinstance(size, str) and len(terms(size)) == 1:
                found.setdefault(size, int(actual))
    return {n: found.get(n, 1) for n in open_dimensions(graph)}


def with_sizes(graph: Graph, values: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Values with other sizes, their entries repeated or cut."""
    changed = {}
    for given in graph.inputs:
        dims = {d: str(d) for d, s in enumerate(given.shape) if isinstance(s, str)}
        wanted = {str(d): number(given.shape[d], sizes) for d in dims}
        changed[given.name] = resized(values[given.name], dims, wanted)
    return changed
