"""Takes a lifted block's gate_linear apart, so that a captured file has one form of gate, the one that exporters write.

Before: gate_linear: (f32[T, K], i32[T, K]) = moec.gate_linear(x, w, bias, selection_bias, spec, "float32")
After:  linear: f32[T, E] = aten.linear(x, w, bias);  gate: .. = moec.gate(linear, selection_bias, spec)

The pass fuse-gate puts them together again where an engine is compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from moec.passes.infra.rewrite import call

aten, moec = torch.ops.aten, torch.ops.moec


def split_gates(gm: GraphModule) -> None:
    """Rewrites every gate_linear, in place."""
    for node in gm.graph.find_nodes(op="call_function", target=moec.gate_linear.default):
        x, w, bias, selection, spec, router_dtype = node.args
        dtype = getattr(torch, str(router_dtype))

        def cast(value: Any, dtype: torch.dtype = dtype, like: Any = node) -> Any:
            if value is None or value.meta["val"].dtype == dtype:
                return value
            return call(gm.graph, aten.to.dtype, (value, dtype), like=like)

        with gm.graph.inserting_before(node):
            logits = call(gm.graph, aten.linear.default, (cast(x), cast(w), cast(bias)), like=node)
            gate = call(gm.graph, moec.gate.default, (logits, selection, spec), like=node)
        node.replace_all_uses_with(gate)
        gm.graph.erase_node(node)
    gm.recompile()
