"""What a model is, without its weights: parameters, cache bytes and FLOPs counted on the captured graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moec.compiler.capture import capture
from moec.compiler.export.flop_rule import EXPERTS
from moec.compiler.export.model_facts import gate_of, model_facts
from moec.passes.infra.base import PassContext
from moec.passes.infra.runner import run_passes
from moec.passes.lift_experts import LiftExperts
from moec.passes.lift_gate import LiftGate
from moec.passes.stack_expert_weights import StackExpertWeights


def inspect_model(model: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """The fields of `moec inspect MODEL --json`. Arguments as for compile; the safetensors may be missing.

    Shapes come from the graph, the gate from the same pass that compile runs. No weight is read: selection biases are
    random here, which changes no field of a gate's spec.
    Raises: CompileError: as capture.
    """
    is_directory = (Path(model) / "config.json").is_file()
    captured = capture(model, random_weights=0 if is_directory else None, trust_remote_code=trust_remote_code)
    facts = model_facts(captured)
    _cut_after_first_experts(captured.graph_module.graph)
    gates = (LiftExperts(), StackExpertWeights(), LiftGate())
    result = run_passes(captured.graph_module, gates, PassContext(read=captured.read))
    facts["gate"] = gate_of(result.graph.graph)
    return facts


def _cut_after_first_experts(graph: torch.fx.Graph) -> None:
    """Ends the graph where the first layer with experts ends: one gate is asked for, and there may be a hundred."""
    first = next(iter(graph.find_nodes(op="call_function", target=EXPERTS)), None)
    if first is None:
        return
    for node in reversed(list(graph.nodes)):
        if node.meta.get("layer") == first.meta["layer"] and node.op == "call_function":
            graph.output(node)
            return
        if node.op != "placeholder":
            graph.erase_node(node)
