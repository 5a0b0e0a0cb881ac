"""Graph hygiene right after export, so that passes see a functional graph of real work.

Dropped: metadata asserts, casts to the same dtype, aliases, dropout, dead writes. Replaced: in-place ops
(functional.py), sizes read from intermediate tensors (sizes.py), -1 in shapes (ambiguous for T = 0), the device.
"""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moec.compiler.capture.aliases import rename_aliases
from moec.compiler.capture.functional import make_functional
from moec.compiler.capture.sizes import Sizes, expression
from moec.compiler.capture.tensors import storage_of
from moec.compiler.errors import UnsupportedModel
from moec.passes.infra.rewrite import is_call, remove_dead

aten = torch.ops.aten

ASSERTS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)
# ops that give their first argument unchanged when dtype, shape and strides are its own
IDENTITIES = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.slice.Tensor,
    aten.squeeze.dim,
)
COPIES = (aten.clone.default,)
SHAPED = (aten.view.default, aten.reshape.default, aten.expand.default)
SIZE_FUNCTIONS = (
    operator.add,
    operator.sub,
    operator.mul,
    operator.floordiv,
    operator.mod,
    operator.neg,
    operator.getitem,
    torch.sym_max,
    torch.sym_min,
)
_LAYER = re.compile(r"(?:^|[._])(?:layers?|h|blocks?)[._](\d+)(?:$|[._])")


def clean(gm: GraphModule) -> None:
    """Cleans the graph in place. Raises: UnsupportedModel: an op that has no place in a compiled graph."""
    for node in list(gm.graph.nodes):
        if is_call(node, *ASSERTS):
            gm.graph.erase_node(node)
    _drop_size_checks(gm)
    rename_aliases(gm)
    _check_targets(gm)
    set_layers(gm)
    _drop_identities(gm, IDENTITIES)
    sizes = Sizes(gm)
    make_functional(gm, sizes)
    _drop_identities(gm, (*IDENTITIES, *COPIES))
    _name_sizes(gm, sizes)
    _resolve_shapes(gm, sizes)
    _loosen_views(gm)
    _forget_device(gm)
    set_layers(gm)
    remove_dead(gm)
    _check_shapes(gm)
    gm.graph.lint()
    gm.recompile()


def layer_in(name: str) -> int | None:
    """The layer index in a dotted or underscored module or parameter name."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def set_layers(gm: GraphModule) -> None:
    """meta["layer"] of every node, from its module stack; weights take it from their names."""
    for node in gm.graph.nodes:
        if "layer" in node.meta:
            continue
        layer = None
        if node.op == "get_attr":
            layer = layer_in(str(node.target))
        for path, *_ in (node.meta.get("nn_module_stack") or {}).values():
            layer = layer_in(path) if layer is None else layer
        node.meta["layer"] = layer


def _drop_size_checks(gm: GraphModule) -> None:
    """Comparisons of sizes that only asserts read."""
    for node in reversed(gm.graph.nodes):
        if node.op == "call_function" and not node.users and not isinstance(node.target, torch._ops.OpOverload):
            gm.graph.erase_node(node)


def _check_targets(gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.op == "call_function":
            known = isinstance(node.target, torch._ops.OpOverload) or node.target in SIZE_FUNCTIONS
            if not known:
                raise UnsupportedModel(f"{node.name}: {node.target} has no place in a compiled graph")
        elif node.op in ("call_module", "call_method"):
            raise UnsupportedModel(f"{node.name}: a {node.op} of {node.target} has no place in a compiled graph")


def _drop_identities(gm: GraphModule, targets: tuple[Any, ...]) -> None:
    for node in list(gm.graph.nodes):
        off = is_call(node, aten.dropout.default) and not node.args[2]
        if off or (is_call(node, *targets) and _is_identity(node)):
            node.replace_all_uses_with(node.args[0], propagate_meta=False)
            gm.graph.erase_node(node)


def _is_identity(node: Node) -> bool:
    source = node.args[0]
    if not isinstance(source, Node) or node.kwargs.get("copy"):
        return False
    a, b = source.meta.get("val"), node.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dtype != b.dtype or a.dim() != b.dim():
        return False
    if node.target in (aten.slice.Tensor,) and storage_of(a) != storage_of(b):
        return False
    pairs = [*zip(a.shape, b.shape, strict=True), *zip(a.stride(), b.stride(), strict=True)]
    return all(expression(x) == expression(y) for x, y in pairs)


def _name_sizes(gm: GraphModule, sizes: Sizes) -> None:
    """Reads every size from the inputs instead of intermediate tensors."""
    for node in list(gm.graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.SymInt):
            continue
        known = sizes.node(value)
        if known is not None and known is not node:
            _replace_size(node, known)


def _replace_size(node: Node, known: int | Node) -> None:
    if isinstance(known, Node):
        node.replace_all_uses_with(known, propagate_meta=False)
        return
    for user in list(node.users):
        user.args = torch.fx.map_arg(user.args, lambda a: known if a is node else a)
        user.kwargs = torch.fx.map_arg(user.kwargs, lambda a: known if a is node else a)


def _resolve_shapes(gm: GraphModule, sizes: Sizes) -> None:
    for node in gm.graph.nodes:
        if _has_open_size(node):
            actual = [sizes.node(s) for s in node.meta["val"].shape]
            if all(s is not None for s in actual):
                shape = [a if isinstance(g, int) and g == -1 else g for g, a in zip(node.args[1], actual, strict=True)]
                node.args = (node.args[0], shape, *node.args[2:])


def _loosen_views(gm: GraphModule) -> None:
    """ATen's attention lays its result out as its operands, which passes may turn; views behind it may then copy."""
    if gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        for node in gm.graph.find_nodes(op="call_function", target=aten.view.default):
            node.target = aten.reshape.default


def _has_open_size(node: Node) -> bool:
    return is_call(node, *SHAPED) and any(isinstance(g, int) and g == -1 for g in node.args[1])  # type: ignore[union-attr]


def _check_shapes(gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        if _has_open_size(node):
            raise UnsupportedModel(f"{node.name}: the shape {list(node.meta['val'].shape)} is not a sum or product")


def _forget_device(gm: GraphModule) -> None:
    """A graph has no device of its own; the placeholder for it is the CPU."""
    cpu = torch.device("cpu")
    for node in gm.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, lambda a: cpu if isinstance(a, torch.device) else a)
        if isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": cpu}
