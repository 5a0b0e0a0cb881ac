"""Turns an exported program into a graph of ours: parameters become get_attr nodes with lazy weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx import GraphModule, Node

from moec.compiler.capture.cleanup import clean, set_layers
from moec.compiler.errors import UnsupportedModel
from moec.passes.ir.weights import Weight, add_weight, weights_of


def adopt(
    exported: ExportedProgram, inputs: Sequence[str], weights: Mapping[str, Weight], prefix: str = ""
) -> GraphModule:
    """A clean graph module (see cleanup.py) with weights; an output that is the only one stands alone, not in a tuple.

    Args: inputs: new names of the user inputs, in order; those that are constants of the trace get no placeholder.
          weights: dotted parameter, buffer or constant name -> its Weight.
          prefix: what the exported program's names have in front of those.
    Raises: UnsupportedModel: the program writes to its own buffers, or keeps a tensor without a weight.
    """
    signature = exported.graph_signature
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if written:
        raise UnsupportedModel(f"the module writes to its own state ({written[0]}); a compiled graph keeps none")
    gm = GraphModule(torch.nn.Module(), exported.graph)
    placeholders = {n.name: n for n in gm.graph.find_nodes(op="placeholder")}
    names = iter(inputs)
    attributes: dict[Weight, str] = {}
    for spec in signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind is InputKind.USER_INPUT:
            name = next(names)
            if isinstance(spec.arg, TensorArgument):
                rename(node, name)
            else:
                gm.graph.erase_node(node)
            continue
        if not node.users:
            gm.graph.erase_node(node)
            continue
        name = str(spec.target).removeprefix(prefix)
        if name not in weights:
            raise UnsupportedModel(f"{name}: a {spec.kind.name.lower()} of the trace without a checkpoint tensor")
        _as_attribute(gm, node, name, weights[name], attributes)
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta["layer"] = None
    output = gm.graph.output_node()
    if len(output.args[0]) == 1:  # type: ignore[arg-type]
        output.args = (output.args[0][0],)  # type: ignore[index]
    set_layers(gm)
    clean(gm)
    _drop_unread(gm)
    return gm


def rename(node: Node, name: str) -> None:
    """Gives a placeholder another name."""
    node._rename(name)
    node.target = node.name


def _as_attribute(gm: GraphModule, node: Node, name: str, weight: Weight, attributes: dict[Weight, str]) -> None:
    if weight not in attributes:
        attributes[weight] = add_weight(gm, name, weight)
    with gm.graph.inserting_before(node):
        attribute = gm.graph.get_attr(attributes[weight])
    attribute.meta["val"] = node.meta["val"]
    if tuple(node.meta["val"].shape) != weight.shape:
        raise UnsupportedModel(
            f"{name}: shape {list(node.meta['val'].shape)} in the trace, {list(weight.shape)} as a weight"
        )
    node.replace_all_uses_with(attribute, propagate_meta=False)
    gm.graph.erase_node(node)


def _drop_unread(gm: GraphModule) -> None:
    """Forgets the weights of attributes that cleaning made useless."""
    read = {str(n.target) for n in gm.graph.find_nodes(op="get_attr")}
    for name in [n for n in weights_of(gm) if n not in read]:
        del weights_of(gm)[name]
        delattr(gm, name)


def symbol_names(gm: GraphModule, dims: Mapping[tuple[str, int], str]) -> dict[str, str]:
    """Names the graph's symbols: dims is (placeholder, dimension) -> name; gives symbol -> name, also in gm.meta."""
    found: dict[str, str] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            name = dims.get((node.name, dim))
            if name is not None and isinstance(size, torch.SymInt):
                found.setdefault(str(size.node.expr), name)
    gm.meta["symbols"] = found
    return found


def expert_layers(gm: GraphModule) -> tuple[int, ...]:
    """The layers that have experts: an experts op, or a parameter whose name says so (blocks that are lifted later)."""
    layers: set[int] = set()
    for node in gm.graph.nodes:
        named = node.op == "get_attr" and "experts" in str(node.target) and "shared_experts" not in str(node.target)
        if (named or node.target is torch.ops.moec.experts.default) and node.meta.get("layer") is not None:
            layers.add(node.meta["layer"])
    return tuple(sorted(layers))


def small_size_guards(exported: ExportedProgram) -> tuple[str, ...]:
    """The guards of a trace that exclude a size of 1: each a place where T = 1 must be proven."""
    found: list[Any] = getattr(exported, "_guards_code", None) or []
    return tuple(g for g in map(str, found) if ">= 2" in g or "!= 1" in g)
