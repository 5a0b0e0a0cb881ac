"""Runs a graph, or a piece of one, on real tensors: weights are made when first read, dropped after their last use."""

from __future__ import annotations

import contextlib
import functools
import math
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from moec.passes.ir import ops  # noqa: F401  (registers the ops)
from moec.passes.ir.by_expert import ByExpert, CombineGemm, Experts, GroupedGemm, run
from moec.passes.ir.weights import Read, Weight, weights_of

Constant = Callable[[str], Tensor]
BY_EXPERT: dict[Any, type[ByExpert]] = {
    torch.ops.moec.experts.default: Experts,
    torch.ops.moec.grouped_gemm.default: GroupedGemm,
    torch.ops.moec.combine_gemm.default: CombineGemm,
}
CPU = torch.device("cpu")


def constants(gm: GraphModule, read: Read | None) -> Constant:
    """attribute name -> tensor. Weights come from `read`, or are random where it is None (see random_weight)."""
    return constants_of(weights_of(gm), lambda name: attribute(gm, name), read)


def constants_of(weights: Mapping[str, Weight], plain: Constant, read: Read | None) -> Constant:
    """As constants, for weights held apart from a module; `plain` gives attributes that are no weights."""

    def get(name: str) -> Tensor:
        return made(weights[name], read) if name in weights else plain(name)

    return get


def made(weight: Weight, read: Read | None) -> Tensor:
    """The tensor; a stand-in where nothing can be read (see random_weight)."""
    return random_weight(weight) if read is None else weight.materialise(read)


def attribute(gm: GraphModule, name: str) -> Tensor:
    """The attribute that a get_attr node names (dots descend)."""
    found: Any = gm
    for part in name.split("."):
        found = getattr(found, part)
    return found


CHUNK_VALUES = 1 << 22
"""Random numbers made at a time: a stack of all experts in float32 would be four times as large as the model's."""


def random_weight(weight: Weight) -> Tensor:
    """A stand-in made by the weight's own recipe, so that two recipes of the same tensors agree.

    Matrices are normal with standard deviation 1/sqrt(last size), vectors 1 + normal/4, integers zero; each source
    tensor is seeded by its name.
    """
    return weight.materialise(random_read([weight]))


def random_read(weights: Iterable[Weight]) -> Read:
    """Stand-ins for the source tensors of weights, by name; each is made once and kept as long as the reader is."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def visit(w: Weight) -> None:
        if w.op == "source":
            shapes[w.args[0]] = (w.shape, w.dtype)
        for inner in w.inputs:
            visit(inner)

    for weight in weights:
        visit(weight)
    return functools.cache(lambda name: _random_source(name, *shapes[name]))


def _random_source(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    out = torch.empty(shape, dtype=dtype)
    flat = out.view(-1)
    start = 0
    while start < len(flat):
        left = len(flat) - start
        count = left if left < CHUNK_VALUES + 16 else CHUNK_VALUES  # torch makes normal numbers 16 at a time
        noise = torch.randn(count, generator=generator)
        flat[start : start + count] = noise / math.sqrt(shape[-1]) if len(shape) > 1 else 1 + noise / 4
        start += count
    return out


def run_nodes(
    nodes: Iterable[Node], given: Mapping[str, Any], constant: Constant, keep: Collection[str]
) -> dict[str, Any]:
    """Runs nodes in the given order and returns the values named in `keep`.

    given: values by node name, for what the nodes read from outside. In-place ops change the tensors of `given`.
    Raises: whatever an op raises, with the node's name added.
    """
    running = steps(nodes, given, constant, keep)
    while True:
        try:
            run(next(running))
        except StopIteration as done:
            values: dict[str, Any] = done.value
            return values


def steps(
    nodes: Iterable[Node], given: Mapping[str, Any], constant: Callable[[str], Any], keep: Collection[str]
) -> Generator[ByExpert, None, dict[str, Any]]:
    """As run_nodes, where `constant` may give a weight that is no tensor but makes its experts one by one.

    Yields: each op that reads one, under way; it has to be given all its experts before the run goes on.
    """
    order = list(nodes)
    uses = Counter(p.name for n in order for p in n.all_input_nodes)
    env, kept = dict(given), set(keep)
    for node in order:
        with _named(node):
            value = _run(node, env, constant)
            if isinstance(value, ByExpert):
                yield value
                value = value.result()
        env[node.name] = value
        for p in node.all_input_nodes:
            uses[p.name] -= 1
            if not uses[p.name] and p.name not in kept and p.name not in given:
                env.pop(p.name, None)
    return {name: env[name] for name in kept}


def _run(node: Node, env: Mapping[str, Any], constant: Callable[[str], Any]) -> Any:
    """A node's value; of an op over stacks that are no tensors, the op under way."""
    if node.op == "get_attr":
        return constant(str(node.target))
    if node.op != "call_function":
        raise ValueError(f"{node.name}: a graph of moec has no {node.op} nodes inside")
    args, kwargs = map_aggregate((node.args, node.kwargs), lambda a: _actual(a, env))  # type: ignore[misc]
    one_by_one = BY_EXPERT.get(node.target)
    if one_by_one and not all(isinstance(args[place], Tensor) for place in one_by_one.places):
        return one_by_one(*args, **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


@contextlib.contextmanager
def _named(node: Node) -> Iterator[None]:
    """Adds a node to what is raised."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while evaluating {node.name} = {node.target}")
        raise


def _actual(arg: Any, env: Mapping[str, Any]) -> Any:
    """A node's value; a device becomes the CPU, whatever device the graph was traced on."""
    if isinstance(arg, Node):
        return env[arg.name]
    return CPU if isinstance(arg, torch.device) else arg


@torch.no_grad()
def evaluate(gm: GraphModule, inputs: Sequence[Any], read: Read | None = None) -> Any:
    """Runs a whole graph: inputs in placeholder order -> its output. Caches among the inputs are written in place."""
    names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    if len(names) != len(inputs):
        raise ValueError(f"the graph takes {len(names)} inputs ({', '.join(names[:4])}, ..), got {len(inputs)}")
    given = dict(zip(names, inputs, strict=True))
    output = gm.graph.output_node()
    wanted = {n.name for n in output.all_input_nodes}
    inner = (n for n in gm.graph.nodes if n.op not in ("placeholder", "output"))
    values = given | run_nodes(inner, given, constants(gm, read), wanted - set(given))
    return map_aggregate(output.args[0], lambda a: _actual(a, values))
