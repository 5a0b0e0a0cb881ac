"""One name for operators that ATen has under several: what passes and the runtime's list look for."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

aten = torch.ops.aten

SAME = {
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    "absolute": "abs",
    "divide": "div",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "subtract": "sub",
}
"""ATen name -> the name of the operator that it is an alias of, overload by overload."""


def rename_aliases(gm: GraphModule) -> None:
    """Replaces each alias by its operator, and transformers' own grouped product by ATen's, in place."""
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        namespace, name = node.target._schema.name.split("::")
        if namespace == "aten" and name in SAME:
            node.target = getattr(getattr(aten, SAME[name]), node.target._overloadname)
        elif (namespace, name) == ("transformers", "grouped_mm_fallback"):
            node.target = aten._grouped_mm.default
            node.args, node.kwargs = (*node.args, *node.kwargs.values()), {}  # x, weight and ends, in this order
