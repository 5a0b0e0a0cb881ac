"""Layers of experts in a graph, as moec::experts or as dispatch, grouped_gemm and combine_gemm, for measuring them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.rewrite import calls, is_call
from moec.passes.ir.experts_call import ExpertsCall

aten, moec = torch.ops.aten, torch.ops.moec


@dataclasses.dataclass(frozen=True)
class ExpertLayer:
    """x [T,H], experts int[T,K], factors: routing weights as [T,K] or, by slot, as [T*(K+s)]; both stacks.

    result: y [T,H].  residual: the sum of y and what the layer adds it to, y itself where that is not found.
    """

    layer: int | None
    x: Node
    experts: Node
    factors: Node
    gate_up: Node
    down: Node
    b_gate_up: Node | None
    b_down: Node | None
    act: str
    num_shared: int
    result: Node
    residual: Node

    @property
    def wanted(self) -> set[str]:
        """Names of the values that a measurement reads."""
        return {n.name for n in (self.x, self.experts, self.factors, self.result, self.residual)}


def expert_layers(gm: GraphModule) -> list[ExpertLayer]:
    """Every layer whose two stacks are weights and not computed, in order."""
    found = [_of_experts(n) for n in calls(gm, moec.experts.default)]
    found += [_of_chain(n) for n in calls(gm, moec.combine_gemm.default)]
    return [one for one in found if one is not None]


def _of_experts(node: Node) -> ExpertLayer | None:
    c = ExpertsCall.of(node)
    if c.transposed or c.interleaved or not _stored(c.w_gate_up, c.w_down, c.b_gate_up, c.b_down):
        return None
    return ExpertLayer(
        node.meta.get("layer"), c.x, c.experts, c.weights, c.w_gate_up, c.w_down, c.b_gate_up, c.b_down, c.act,
        c.num_shared, node, _residual(node),
    )  # fmt: skip


def _of_chain(node: Node) -> ExpertLayer | None:
    """combine_gemm(h, w, bias, slot_order, expert_start, slot_weight, slots_per_token) back to its dispatch."""
    h, down, b_down, order, _, on_output = node.args[:6]
    if not is_call(h, moec.grouped_gemm.default):
        return None
    x, gate_up, b_gate_up, _, _, on_input, _, act = h.args  # type: ignore[union-attr]
    dispatch: Any = order.args[0]  # type: ignore[union-attr]
    factors = on_output if on_output is not None else on_input
    if not is_call(dispatch, moec.dispatch.default) or factors is None:
        return None
    if not _stored(gate_up, down, b_gate_up, b_down):
        return None
    num_shared = dispatch.args[2] if len(dispatch.args) > 2 else dispatch.kwargs.get("num_shared", 0)
    return ExpertLayer(
        node.meta.get("layer"), x, dispatch.args[0], factors, gate_up, down, b_gate_up, b_down, str(act),  # type: ignore[arg-type]
        int(num_shared), node, _residual(node),
    )  # fmt: skip


def _stored(*nodes: Any) -> bool:
    return all(n is None or n.op == "get_attr" for n in nodes)


def _residual(node: Node) -> Node:
    """The sum that a layer's result goes into."""
    for user in node.users:
        if is_call(user, aten.add.Tensor):
            return user
        if is_call(user, moec.add_rms_norm.default):
            return next((u for u in user.users if u.args[1] == 1), node)
        if is_call(user, aten.view.default, aten.unsqueeze.default, aten.reshape.default):
            return _residual(user)
    return node
