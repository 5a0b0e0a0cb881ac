"""Probe inputs for a piece of a graph: what its inputs may hold, and the adversarial cases.

A probe fixes T and a manner. Sizes come from the fake values, contents from what a value is: a float is data, an index
lies within what it indexes, positions and slots never name one cache place twice.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from moec.passes.infra.rewrite import is_call, symbolic

aten = torch.ops.aten
NUM_CACHE_SLOTS, CACHE_LENGTH, OTHER_SIZE = 3, 32, 6


@dataclasses.dataclass(frozen=True)
class Probe:
    """name: for the record. tokens: the value of T. manner: "random", "scales" (tiny, large and zero rows), "same"
    (every token alike: all go to the same experts, the others stay empty)."""

    name: str
    tokens: int
    manner: str


PROBES = (
    Probe("random", 17, "random"),
    Probe("scales", 17, "scales"),
    Probe("one-routing", 17, "same"),
    Probe("T=1", 1, "random"),
    Probe("T=0", 0, "random"),
)


def symbol_values(graph: Graph, tokens: int) -> dict[str, int]:
    """A value for every symbol among the graph's inputs: the first is T, a cache's are N and L, others OTHER_SIZE."""
    symbols = _symbols(graph)
    return {s: tokens if i == 0 else other for i, (s, other) in enumerate(symbols.items())}


@functools.lru_cache(maxsize=64)
def _symbols(graph: Graph) -> dict[str, int]:
    """Every symbol among the inputs in order, with its value where it is not T."""
    values: dict[str, int] = {}
    for node in graph.find_nodes(op="placeholder"):
        for dim, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            for symbol in sorted(map(str, getattr(symbolic(size), "free_symbols", ()))):
                is_cache = node.name.startswith("cache")
                other = (NUM_CACHE_SLOTS, CACHE_LENGTH)[dim] if is_cache and dim < 2 else OTHER_SIZE
                values.setdefault(symbol, other)
    return values


def concrete(shape: Iterable[Any], values: Mapping[str, int]) -> tuple[int, ...]:
    """A fake shape with numbers for its symbols."""
    return tuple(_number(symbolic(s), values) for s in shape)


def _number(expr: Any, values: Mapping[str, int]) -> int:
    return expr if isinstance(expr, int) else _evaluated(expr, tuple(values.items()))


@functools.lru_cache(maxsize=4096)
def _evaluated(expr: Any, values: tuple[tuple[str, int], ...]) -> int:
    known = dict(values)
    return int(expr.subs({s: known[str(s)] for s in expr.free_symbols}))


def make(node: Node, probe: Probe, values: Mapping[str, int], users: Iterable[Node]) -> Any:
    """A value for one input of a region. users: the nodes that read it, in both graphs."""
    val = node.meta["val"]
    if not isinstance(val, Tensor):
        return _number(symbolic(val), values)
    shape = concrete(val.shape, values)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{probe.name} {node.name}".encode()))
    if val.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not val.dtype.is_floating_point:
        return _integers(node, shape, probe, generator, list(users)).to(val.dtype)
    data = _manner(torch.randn(shape, generator=generator), val.shape, probe)
    return data.to(val.dtype)


def _manner(data: Tensor, shape: torch.Size, probe: Probe) -> Tensor:
    """Applies the probe's manner along the first symbolic axis (the tokens)."""
    axis = next((i for i, s in enumerate(shape) if isinstance(s, torch.SymInt)), None)
    if axis is None or not data.shape[axis]:
        return data
    if probe.manner == "same":
        return data.narrow(axis, 0, 1).expand(data.shape).contiguous()
    if probe.manner == "scales":
        factors = torch.tensor([1.0, 0.01, 8.0, 0.0])
        column = factors[torch.arange(data.shape[axis]) % len(factors)]
        return data * column.view([-1 if i == axis else 1 for i in range(data.dim())])
    return data


def _integers(
    node: Node, shape: tuple[int, ...], probe: Probe, generator: torch.Generator, users: list[Node]
) -> Tensor:
    if node.op == "placeholder" and node.name in ("positions", "slots"):
        t = torch.arange(shape[0])
        return t // NUM_CACHE_SLOTS if node.name == "positions" else t % NUM_CACHE_SLOTS
    bound = index_bound(node) or min(_indexed_sizes(users), default=4)
    if len(shape) == 2 and shape[1] <= bound and node.op != "placeholder":
        return _routing(shape, bound, probe, generator)
    return torch.randint(0, max(bound, 1), shape, generator=generator)


def _routing(shape: tuple[int, ...], num_experts: int, probe: Probe, generator: torch.Generator) -> Tensor:
    """[T, K] distinct experts per row; "same": the last K for every token, so that all others are empty."""
    if probe.manner == "same":
        return torch.arange(num_experts - shape[1], num_experts).expand(shape).contiguous()
    return torch.rand(shape[0], num_experts, generator=generator).argsort(-1)[:, : shape[1]]


def index_bound(node: Node) -> int | None:
    """How many things an index chooses among: the last axis of what a top-k, sort or gate looked at; None: unknown."""
    maker = node.args[0] if is_call(node, operator.getitem) else node
    if not isinstance(maker, Node) or maker.op != "call_function":
        return None
    if maker.target is torch.ops.moec.gate_linear.default:
        return int(maker.args[1].meta["val"].shape[0])  # type: ignore[union-attr]
    floats = [n.meta["val"] for n in maker.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    floats = [v for v in floats if v.dtype.is_floating_point and v.dim()]
    size = floats[0].shape[-1] if floats else None
    return size if isinstance(size, int) else None


def _indexed_sizes(users: list[Node]) -> Iterable[int]:
    for user in users:
        if is_call(user, aten.embedding.default):
            yield int(user.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
        elif is_call(user, torch.ops.moec.dispatch.default):
            yield int(user.args[1])  # type: ignore[arg-type]
        elif is_call(user, torch.ops.moec.experts.default):
            yield int(user.args[3].meta["val"].shape[0])  # type: ignore[union-attr]
