"""Inputs and outputs of an exported model: names, symbolic shapes, dtypes.

A language model, for B sequences, S new tokens of each after P earlier ones (L = P + S):

    input_ids       i64[B, S]
    attention_mask  i64[B, L]     1 for tokens, 0 for padding, earlier tokens included
    past_key_values.<layer>.key, .value      [B, C, P, D]      (.latent, .rope  [B, P, D] where latents are cached)
    ->
    logits          [B, S, V]
    present.<layer>.key, .value              [B, C, L, D]      the past of the next call

A plain module keeps its own inputs; its outputs are called output, or output_0, output_1, ... What came from an ONNX
file keeps the file's names, those of open dimensions ("past + new") included.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import GraphModule, Node

import moec.passes.ir.bias_ops  # noqa: F401  (registers torch.ops.moec.biased_attention)
from moec.compiler.capture.captured import CacheSpec, Captured
from moec.compiler.export.onnx.errors import ExportError
from moec.passes.infra.rewrite import symbolic
from moec.passes.ir.text import size_text

ROLES = {
    torch.ops.moec.cached_attention.default: {"k_cache": "key", "v_cache": "value"},
    torch.ops.moec.biased_attention.default: {"k_cache": "key", "v_cache": "value"},
    torch.ops.moec.latent_attention.default: {"latent_cache": "latent", "rope_cache": "rope"},
}
"""Ops that keep tokens -> argument -> what the argument's cache is called."""
BATCH, NEW, PAST = "batch", "sequence", "past_sequence"
TOTAL = f"{PAST} + {NEW}"
TOKENS, MASK, LOGITS = "input_ids", "attention_mask", "logits"


@dataclasses.dataclass(frozen=True)
class Port:
    """One input or output. shape: sizes; names of symbolic ones, or expressions of names."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class CachePort:
    """One cache, as it comes in (`past`) and goes out (`present`). heads_first: [B, C, P, D] instead of [B, P, ..]."""

    spec: CacheSpec
    past: Port
    present: Port
    heads_first: bool


@dataclasses.dataclass(frozen=True)
class Interface:
    """caches: of a language model, in the order of the graph's; empty for a plain module."""

    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    caches: tuple[CachePort, ...] = ()


def interface_of(captured: Captured) -> Interface:
    """Raises: ExportError: a cache of a kind that has no ONNX form."""
    if captured.kind == "module":
        return _of_module(captured)
    caches = _caches(captured)
    ids = Port(TOKENS, (BATCH, NEW), torch.int64)
    mask = Port(MASK, (BATCH, TOTAL), torch.int64)
    inputs = (ids, mask, *(c.past for c in caches))
    return Interface(inputs, (LOGITS, *(c.present.name for c in caches)), caches)


def _caches(captured: Captured) -> tuple[CachePort, ...]:
    roles: dict[str, str] = {}
    keepers: dict[str, str] = {}
    for node in captured.graph_module.graph.nodes:
        for name, role in ROLES.get(node.target, {}).items():
            roles[_argument(node, name).name] = role
        keepers |= {n.name: str(node.target) for n in node.all_input_nodes if n.op == "placeholder"}
    ports: list[CachePort] = []
    taken: set[str] = set()
    for spec in captured.info.caches:
        if spec.name not in roles:
            raise ExportError(
                f"layer {spec.layer}: {keepers.get(spec.name, spec.name)} has no ONNX form: only attention over all "
                "keys and values, or over latents, does; moec compile runs this model"
            )
        role = f"{spec.layer}.{roles[spec.name]}"
        while role in taken:  # two attentions in a layer
            role += "_2"
        taken.add(role)
        ports.append(_cache_port(spec, role))
    return tuple(ports)


def _cache_port(spec: CacheSpec, role: str) -> CachePort:
    heads_first = len(spec.shape) == 2

    def shape(length: str) -> tuple[int | str, ...]:
        if heads_first:
            return (BATCH, spec.shape[0], length, spec.shape[1])
        return (BATCH, length, *spec.shape)

    past = Port(f"past_key_values.{role}", shape(PAST), spec.dtype)
    return CachePort(spec, past, Port(f"present.{role}", shape(TOTAL), spec.dtype), heads_first)


def _argument(node: Node, name: str) -> Node:
    """An op's argument by its name in the schema."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name)
    return node.args[position] if position < len(node.args) else node.kwargs[name]  # type: ignore[return-value]


def _of_module(captured: Captured) -> Interface:
    gm: GraphModule = captured.graph_module
    file = captured.info.config.get("onnx")
    if file is not None:
        nodes = gm.graph.find_nodes(op="placeholder")
        shapes = (tuple(file["dimensions"][name]) for name in file["inputs"])
        named = zip(file["inputs"], shapes, nodes, strict=True)
        return Interface(tuple(Port(n, s, p.meta["val"].dtype) for n, s, p in named), tuple(file["outputs"]))
    inputs = tuple(_port(n, captured.symbols) for n in gm.graph.find_nodes(op="placeholder"))
    returned = gm.graph.output_node().args[0]
    count = len(returned) if isinstance(returned, (tuple, list)) else 1
    return Interface(inputs, tuple(f"output_{i}" for i in range(count)) if count > 1 else ("output",))


def _port(node: Node, symbols: dict[str, str]) -> Port:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise ExportError(f"input {node.name} is a {type(value).__name__}; an ONNX model takes tensors")
    shape = (size_text(symbolic(n), symbols) if isinstance(n, torch.SymInt) else int(n) for n in value.shape)
    return Port(node.name, tuple(shape), value.dtype)
