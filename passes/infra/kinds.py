"""When two pieces of a graph are of one kind: the same but for names, so that one examination serves all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from torch.fx import Node
from torch.fx.node import map_aggregate

from moec.passes.infra.rewrite import Region
from moec.passes.ir.text import type_text
from moec.passes.ir.weights import Weight


def kind_of(region: Region) -> str:
    """Equal for regions with the same calls, constants and shapes, whatever their names and weights."""
    digest, number = hashlib.sha256(), numbering()
    for node in (*region.inputs, *region.templates, *region.sizes, *region.nodes):
        digest.update(node_text(node, number).encode())
    digest.update(" ".join(number(n.name) for n in region.outputs).encode())
    return digest.hexdigest()


def numbering() -> Callable[[str], str]:
    """name -> a number by first appearance."""
    numbers: dict[str, int] = {}
    return lambda name: f"#{numbers.setdefault(name, len(numbers))}"


def node_text(node: Node, number: Callable[[str], str]) -> str:
    """A node without its name; of a get_attr node only the shape."""
    args = map_aggregate((node.args, node.kwargs), lambda a: number(a.name) if isinstance(a, Node) else a)
    target = node.target if node.op == "call_function" else node.op
    return f"{number(node.name)} {target} {args} {type_text(node.meta.get('val'), {})} "


def recipe_text(weight: Weight, number: Callable[[str], str]) -> str:
    """A weight's recipe with numbered sources."""
    if weight.op == "source":
        return number(f"source {weight.args[0]}")
    return f"{weight.op}{weight.args}({','.join(recipe_text(w, number) for w in weight.inputs)})"
