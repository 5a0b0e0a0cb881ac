"""Facts of a captured model: what `inspect` prints and the manifest keeps, read from the graph and not from names."""

from __future__ import annotations

import json
from typing import Any

import torch

from moec.compiler.capture.captured import Captured
from moec.compiler.capture.tensors import COMPUTED
from moec.compiler.export.flop_rule import EXPERTS, flops_per_4k_tokens
from moec.compiler.export.weight_sizes import weight_bytes
from moec.passes.ir import ops
from moec.passes.ir.weights import Weight, weights_of


def model_facts(captured: Captured) -> dict[str, Any]:
    """The fields of `inspect MODEL`; "gate" is filled in by gate_of once the passes have lifted it.

    Must see the graph as captured, where a layer's experts are one moec::experts node. flops_per_token counts two per
    parameter that a token meets, an embedding left out that is only looked up; flops_per_4k_tokens is a published rule
    (flop_rule.py).
    """
    info, graph = captured.info, captured.graph_module.graph
    weights = weights_of(captured.graph_module)
    total = _distinct_params(list(weights.values()))
    idle, num_experts, top_k = 0, 0, 0
    for node in graph.find_nodes(op="call_function", target=EXPERTS):
        stacks = [weights[str(a.target)] for a in node.args[3:7] if isinstance(a, torch.fx.Node) and a.op == "get_attr"]
        num_experts, top_k = node.args[3].meta["val"].shape[0], node.args[2].meta["val"].shape[1]
        idle += _distinct_params(stacks) * (num_experts - top_k) // num_experts
    looked_up = graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
    tables = [n.args[0] for n in looked_up if n.args[0].op == "get_attr"]
    multiplied = {weights[n.target] for n in graph.find_nodes(op="get_attr") if set(n.users) - set(looked_up)}
    embedding = _distinct_params([w for t in tables if (w := weights[t.target]) not in multiplied])
    active = total - idle
    return {
        "model_type": info.model_type,
        "layers": info.layers,
        "hidden": info.hidden,
        "vocab_size": info.vocab_size,
        "max_positions": info.max_positions,
        "eos_token_ids": list(info.eos_token_ids),
        "moe_layers": list(captured.moe_layers),
        "experts": num_experts,
        "top_k": top_k,
        "gate": None,
        "total_params": total,
        "active_params": active,
        "kv_bytes_per_token": info.kv_bytes_per_token,
        "state_bytes_per_sequence": info.state_bytes_per_sequence,
        "flops_per_token": {"forward": 2 * (active - embedding)},
        "flops_per_4k_tokens": flops_per_4k_tokens(graph, info.hidden, info.layers, info.vocab_size),
        "weight_bytes": weight_bytes(graph, total),
    }


def gate_of(graph: torch.fx.Graph) -> dict[str, Any] | None:
    """The spec of the first lifted gate of a graph, None where there is none."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (
            ops.gate._opoverload,
            ops.gate_linear._opoverload,
        ):
            text = next(a for a in [*node.args, *node.kwargs.values()] if isinstance(a, str) and a.startswith("{"))
            return dict(json.loads(text))
    return None


def _distinct_params(weights: list[Weight]) -> int:
    """Elements of the floating-point tensors, each source tensor once, tables that the model computes left out."""
    seen: dict[str, int] = {}

    def walk(w: Weight) -> None:
        if w.op == "source" and w.dtype.is_floating_point and not w.args[0].startswith(COMPUTED):
            seen[w.args[0]] = w.num_bytes // w.dtype.itemsize
        if w.op == "dequantise":  # a parameter is what the model sees, not the words and scales that it is stored as
            seen[next(w.sources())] = w.num_bytes // w.dtype.itemsize
            return
        for inner in w.inputs:
            walk(inner)

    for weight in weights:
        walk(weight)
    return sum(seen.values())
