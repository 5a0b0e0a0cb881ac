"""Fuses the router's product into the gate: linear + moec::gate -> moec::gate_linear.

Before:
    linear: f32[T, 8] = aten.linear(x_f32, w_f32)
    gate: (f32[T, 2], i32[T, 2]) = moec.gate(linear, None, '{"top_k":2}')
After:
    gate_linear: (f32[T, 2], i32[T, 2]) = moec.gate_linear(x, w, None, None, '{"top_k":2}', "float32")

Casts that only widen x and w to the router's dtype go into the op; views between the parts vanish.

Leaves alone: logits that something else reads too (they would be computed twice), or that no product makes; a router
bias that is added in 16 bits after the product's own rounding.
Needs: lift-gate.  Gives: gates that a kernel can serve in one step.
Source: design.md section 3.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.recipes import recipe_of
from moec.passes.infra.rewrite import call, call_many, calls, is_call, remove_dead, replace
from moec.passes.ir.weights import transpose, weight_node, weights_of

aten, moec = torch.ops.aten, torch.ops.moec
VIEWS = (
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.select.int,
    aten.contiguous.default,
)
TURNS = (aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default)


@dataclasses.dataclass(frozen=True)
class Router:
    """x [.., H] times w [E, H] (w_turned: the node holds [H, E]) plus bias [E], in `dtype`."""

    product: Node
    x: Node
    w: Node
    w_turned: bool
    bias: Node | None
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class FuseGate:
    """See the module."""

    name: str = "fuse-gate"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        entries: list[Match | NoMatch] = []
        for gate in calls(gm, moec.gate.default):
            router = pattern(gate)
            reason = router if isinstance(router, str) else check(gm, router, gate)
            if reason:
                entries.append(NoMatch(reason, gate.name, layer_of(gate)))
                continue
            assert isinstance(router, Router)
            entries.append(Match(rewrite(gm, gate, router), layer_of(gate), str(router.dtype).removeprefix("torch.")))
        ledger = Ledger.of(entries)
        if ledger.matched:
            remove_dead(gm)
        return PassResult(gm, bool(ledger.matched), ledger)


def pattern(gate: Node) -> Router | str:
    """The product that makes a gate's logits, or why there is none."""
    logits = _through_views(_operand(gate, 0))
    bias: Node | None = None
    if is_call(logits, aten.add.Tensor) and getattr(logits.args[1], "op", "") == "get_attr":
        logits, bias = _through_views(_operand(logits, 0)), _operand(logits, 1)
    operands: tuple[Any, ...] = logits.args
    if is_call(logits, aten.linear.default):
        x, w, own = (*operands, None)[:3]
        turned = False
    elif is_call(logits, aten.mm.default, aten.matmul.default):
        (x, w), own, turned = operands, None, True
    elif is_call(logits, aten.addmm.default):
        own, x, w = operands
        turned = True
    else:
        return f"the logits {logits.name} are made by {logits.target}, which is no product with a weight"
    if bias is not None and own is not None:
        return "the router adds two biases"
    w = _through_widening(w)
    while is_call(w, *TURNS) and w.meta["val"].dim() == 2:
        w, turned = _through_widening(_operand(w, 0)), not turned
    return Router(logits, _through_widening(x), w, turned, bias or own, logits.meta["val"].dtype)


def check(gm: GraphModule, router: Router, gate: Node) -> str:
    """Why a router cannot go into its gate; "" where it can."""
    if recipe_of(router.w, weights_of(gm)) is None:
        return f"the router weight is computed by {router.w.target}"
    if router.bias is not None and router.bias not in router.product.args and router.dtype.itemsize < 4:
        return f"the router bias is added in {router.dtype}, after a rounding of its own"
    node: Any = gate.args[0]
    while isinstance(node, Node):
        others = [u.name for u in node.users if u is not gate]
        if len(node.users) > 1:
            return f"the logits are read by {', '.join(others[:3])} too"
        if node is router.product:
            return ""
        gate, node = node, node.args[0]
    return ""


def rewrite(gm: GraphModule, gate: Node, router: Router) -> str:
    """Puts a moec::gate_linear in the gate's place and returns the new node's name."""
    with gm.graph.inserting_before(gate):
        x, w = router.x, router.w
        if x.meta["val"].dim() != 2:
            x = call(gm.graph, aten.flatten.using_ints, (x, 0, -2), like=gate)
        if router.w_turned or w.op != "get_attr":
            recipe = recipe_of(w, weights_of(gm))
            assert recipe is not None
            w = weight_node(gm, f"{gate.name}_rows", transpose(recipe, 0, 1) if router.w_turned else recipe)
        dtype = str(router.dtype).removeprefix("torch.")
        args = (x, w, router.bias, gate.args[1], gate.args[2], dtype)
        results = call_many(gm.graph, moec.gate_linear.default, args, like=gate)
    for item in list(gate.users):
        replace(item, results[item.args[1]])  # type: ignore[index]
    return _operand(results[0], 0).name


def _operand(node: Node, at: int) -> Node:
    operand = node.args[at]
    assert isinstance(operand, Node)
    return operand


def _through_views(node: Node) -> Node:
    """Back through views that keep the last axis."""
    while is_call(node, *VIEWS) and _operand(node, 0).meta["val"].shape[-1] == node.meta["val"].shape[-1]:
        node = _operand(node, 0)
    return node


def _through_widening(node: Node) -> Node:
    """Back through a cast that loses nothing."""
    while is_call(node, aten.to.dtype, aten._to_copy.default):
        source = _operand(node, 0)
        wider = node.meta["val"].dtype.itemsize >= source.meta["val"].dtype.itemsize
        if not (wider and source.meta["val"].dtype.is_floating_point):
            break
        node = source
    return node
