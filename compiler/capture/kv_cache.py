"""Lets a captured model keep its keys and values in another format than it computes in.

Before:  y = moec.cached_attention(q, k, v, cache_0_a, cache_0_b, slots, positions, ..)       bf16 [N, L, C, D]
After:   y = moec.cached_attention_int8(q, k, v, cache_0_a, cache_0_b, cache_0_c, cache_0_d, slots, positions, ..)

The codes take the place of the keys and values; their scales are two caches more. Latents, states and the keys of
indexers stay as they are.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterable

import torch
from torch import Tensor, fx

import moec.passes.ir.cache_ops  # noqa: F401  (registers torch.ops.moec.cached_attention_int8)
from moec.compiler.capture.captured import CacheSpec, Captured
from moec.compiler.errors import CompileError

FORMATS = ("int8",)
_PLAIN = torch.ops.moec.cached_attention.default
_INT8 = torch.ops.moec.cached_attention_int8.default
CACHES = (3, 4)  # where the op has its caches


def with_kv_cache(captured: Captured, format: str | None) -> Captured:
    """The model with keys and values kept as int8 (None: as captured). Its graph is changed in place.

    Raises: CompileError: no such format, or no layer keeps keys and values.
    """
    if format is None:
        return captured
    if format not in FORMATS:
        raise CompileError(f"kv_cache={format!r}; known: {', '.join(FORMATS)}, or nothing for the model's own dtype")
    graph = captured.graph_module.graph
    specs = {spec.name: spec for spec in captured.info.caches}
    nodes = list(graph.find_nodes(op="call_function", target=_PLAIN))
    if not nodes:
        raise CompileError(
            f"kv_cache={format!r}: no layer of {captured.info.model_type} keeps keys and values that way (latent, "
            f"sparse and recurrent layers keep their own); compile without it"
        )
    for node in nodes:
        _convert(graph, node, specs)
    captured.graph_module.recompile()
    order = [str(n.target) for n in graph.find_nodes(op="placeholder") if str(n.target) in specs]
    info = dataclasses.replace(captured.info, caches=tuple(specs[name] for name in order))
    return dataclasses.replace(captured, info=info)


def _convert(graph: fx.Graph, node: fx.Node, specs: dict[str, CacheSpec]) -> None:
    """One attention, its two caches and their two new ones; `specs` gets the new and the changed."""
    caches: list[fx.Node] = [node.args[i] for i in CACHES]  # type: ignore[misc]
    scales: list[fx.Node] = []
    after = caches[-1]
    for cache in caches:
        spec, value = specs[str(cache.target)], cache.meta["val"]
        specs[spec.name] = dataclasses.replace(spec, dtype=torch.int8)
        cache.meta["val"] = value.to(torch.int8)
        name = _unused(specs, spec.layer)
        specs[name] = CacheSpec(spec.layer, name, spec.shape[:-1], torch.float32)
        with graph.inserting_after(after):
            after = graph.placeholder(name)
        after.meta = {**cache.meta, "val": _scales_of(value)}
        scales.append(after)
    node.target = _INT8
    node.args = (*node.args[: CACHES[-1] + 1], *scales, *node.args[CACHES[-1] + 1 :])


def _scales_of(cache: Tensor) -> Tensor:
    return cache.new_empty(cache.shape[:-1], dtype=torch.float32)


def _unused(names: Iterable[str], layer: int) -> str:
    """The next free name of a layer's caches."""
    taken = set(names)
    return next(n for n in (f"cache_{layer}_{c}" for c in string.ascii_lowercase) if n not in taken)
