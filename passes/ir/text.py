"""A graph as text that a person can read: golden files, dumps and bug reports use it.

graph(tokens: i64[T], positions: i64[T]):
  embedding: bf16[T, 32] = aten.embedding(model_embed_tokens_weight, tokens)
  # layer 0
  rms_norm: bf16[T, 32] = moec.rms_norm(embedding, layers_0_norm_weight, 1e-05)
  return linear_3
weights:
  layers_0_norm_weight: bf16[32] = model.layers.0.norm.weight
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moec.passes.ir.weights import weights_of

DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
LETTERS = ("T", "N", "L")


def symbol_letters(gm: GraphModule) -> dict[str, str]:
    """The letters of the graph's symbolic sizes: gm.meta["symbols"] where capture gave them, else T, N, L in turn."""
    given = gm.meta.get("symbols")
    if given:
        return dict(given)
    letters: dict[str, str] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        for size in getattr(node.meta.get("val"), "shape", ()):
            if isinstance(size, torch.SymInt):
                for name in sorted(str(s) for s in size.node.expr.free_symbols):
                    letters.setdefault(name, LETTERS[len(letters)] if len(letters) < 3 else f"D{len(letters)}")
    return letters


def size_text(size: Any, letters: dict[str, str]) -> str:
    """One size, with the graph's letters for its symbols."""
    return re.sub(r"\b[A-Za-z_]\w*\b", lambda m: letters.get(m[0], m[0]), str(size))


def type_text(val: Any, letters: dict[str, str]) -> str:
    """`f32[T, 32]`, `int`, or a tuple of those."""
    if isinstance(val, Tensor):
        dtype = DTYPES.get(val.dtype, str(val.dtype).removeprefix("torch."))
        return f"{dtype}[{', '.join(size_text(s, letters) for s in val.shape)}]"
    if isinstance(val, (tuple, list)):
        return f"({', '.join(type_text(v, letters) for v in val)})"
    return {torch.SymInt: "int", torch.SymBool: "bool"}.get(type(val), type(val).__name__)


def _type(node: Node, letters: dict[str, str]) -> str:
    return type_text(node.meta.get("val"), letters)


def _arg_text(arg: Any) -> str:
    if isinstance(arg, Node):
        return arg.name
    if isinstance(arg, (tuple, list)):
        return f"[{', '.join(_arg_text(a) for a in arg)}]"
    if isinstance(arg, str):
        return json.dumps(arg) if not arg.startswith("{") else f"'{arg}'"
    return str(arg)


def target_text(target: Any) -> str:
    """`aten.add.Tensor`, without `.default`; `getitem` for results of several."""
    if target is operator.getitem:
        return "getitem"
    return str(target).removesuffix(".default")


def node_text(node: Node, letters: dict[str, str]) -> str:
    """One line for one call."""
    args = [_arg_text(a) for a in node.args] + [f"{k}={_arg_text(v)}" for k, v in node.kwargs.items()]
    return f"{node.name}: {_type(node, letters)} = {target_text(node.target)}({', '.join(args)})"


def graph_text(gm: GraphModule) -> str:
    """The whole graph, then its weights (those that a node reads) and how each is made."""
    return "\n".join(_lines(gm)) + "\n"


def _lines(gm: GraphModule) -> Iterator[str]:
    letters = symbol_letters(gm)
    inputs = gm.graph.find_nodes(op="placeholder")
    yield f"graph({', '.join(f'{n.name}: {_type(n, letters)}' for n in inputs)}):"
    layer = None
    for node in gm.graph.nodes:
        if node.op == "call_function":
            if node.meta.get("layer") != layer:
                layer = node.meta.get("layer")
                yield f"  # layer {layer}" if layer is not None else "  # outside layers"
            yield "  " + node_text(node, letters)
        elif node.op == "output":
            yield f"  return {_arg_text(node.args[0])}"
    weights = weights_of(gm)
    named = gm.graph.find_nodes(op="get_attr")
    if named:
        yield "weights:"
    for node in named:
        weight = weights.get(str(node.target))
        recipe = weight if weight is not None else f"attribute {node.target}"
        yield f"  {node.name}: {_type(node, letters)} = {recipe}"
