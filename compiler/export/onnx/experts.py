"""Which node the experts of a layer become, and what goes into it.

prepare() reads the experts of a canonical graph into Sites and says which weights their nodes take; emit() makes the
node.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import GraphModule, Node

from moec.compiler.export.onnx import microsoft, portable
from moec.compiler.export.onnx.api import KINDS, MICROSOFT
from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.onnx.values import Values
from moec.passes.infra.base import layer_of
from moec.passes.ir.activation import Activation
from moec.passes.ir.experts_call import ExpertsCall
from moec.passes.ir.weights import Weight, reshape, transpose, weights_of

ROLES = {"w_in": "w_gate_up", "w_out": "w_down", "b_in": "b_gate_up", "b_out": "b_down"}
"""What a stack is called in the file -> the argument of moec::experts."""


@dataclasses.dataclass(frozen=True)
class Site:
    """The experts of one layer.

    canonical: the recipes of the stacks by role (w_in [E,2F,H] gate half first, ..).  stored: the same, as the node
    takes them.  names, values: of the initialisers, by role.  in_turn: gate and up rows are stored in turn.
    """

    node: Node
    call: ExpertsCall
    layer: int | None
    canonical: dict[str, Weight]
    stored: dict[str, Weight]
    names: dict[str, str]
    in_turn: bool
    values: dict[str, ir.Value] = dataclasses.field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return self.call.num_routed

    @property
    def where(self) -> str:
        return f"layer {self.layer}, {self.node.name}" if self.layer is not None else self.node.name


def prepare(gm: GraphModule, kind: str) -> dict[Node, Site]:
    """The experts of a canonical graph, by node. Raises: ExportError: this kind of node cannot express one of them."""
    if kind not in KINDS:
        raise ExportError(f"experts={kind!r}; known: {', '.join(KINDS)}")
    sites = {}
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.moec.experts.default):
        site = _site(gm, node, kind)
        if kind == MICROSOFT:
            microsoft.check(site.call, site.where)
        sites[node] = site
    return sites


def _site(gm: GraphModule, node: Node, kind: str) -> Site:
    call = ExpertsCall.of(node)
    layer = layer_of(node)
    where = f"layer {layer}, {node.name}"
    if call.transposed or call.interleaved or call.num_shared:
        raise ExportError(f"{where}: the experts are not in canonical form; this is a defect of moec, please report it")
    canonical: dict[str, Weight] = {}
    for role, argument in ROLES.items():
        operand = getattr(call, argument)
        if operand is None:
            continue
        weight = weights_of(gm).get(str(operand.target)) if operand.op == "get_attr" else None
        if weight is None:
            raise ExportError(
                f"{where}: the graph computes {operand.name}; experts are written from stored weights only"
            )
        canonical[role] = weight
    in_turn = kind == MICROSOFT and Activation.parse(call.act).gated
    stored = {r: _in_turn(w) if in_turn and r.endswith("_in") else w for r, w in canonical.items()}
    stem = f"layers.{layer}.experts" if layer is not None else node.name
    return Site(node, call, layer, canonical, stored, {r: f"{stem}.{r}" for r in canonical}, in_turn)


def _in_turn(w: Weight) -> Weight:
    """[E, 2F, ..] gate half first -> gate and up rows in turn."""
    experts, rows, *rest = w.shape
    halves = reshape(w, (experts, 2, rows // 2, *rest))
    return reshape(transpose(halves, 1, 2), w.shape)


def emit(v: Values, site: Site, kind: str) -> ir.Value:
    """The node: y [T,H]."""
    return _microsoft(v, site) if kind == MICROSOFT else _portable(v, site)


def form_of(site: Site) -> portable.Form:
    """Which function body a portable node has."""
    return portable.Form(site.call.act, "b_in" in site.names, "b_out" in site.names, site.call.weight_on_input)


def _portable(v: Values, site: Site) -> ir.Value:
    form, call = form_of(site), site.call
    given = {"x": v.tensor(call.x), "weights": v.tensor(call.weights, torch.float32), "experts": v.tensor(call.experts)}
    attributes: dict[str, Any] = {"act": call.act, "num_experts": site.num_experts, "top_k": call.top_k}
    if site.layer is not None:
        attributes["layer"] = site.layer
    inputs = [{**given, **site.values}[name] for name in form.inputs]
    return v.b.op(form.name, *inputs, domain=portable.DOMAIN, **attributes)


def _microsoft(v: Values, site: Site) -> ir.Value:
    b, call = v.b, site.call
    x, weights = v.tensor(call.x), v.tensor(call.weights, torch.float32)
    if call.weight_on_input:  # of one expert: its weight goes into x, and counts 1 behind it
        x = b.op("Mul", x, weights)
        weights = b.op("Expand", b.number(1.0, torch.float32), b.op("Shape", weights))
    logits, total = microsoft.as_logits(b, weights, v.tensor(call.experts, torch.int64), site.num_experts)
    y = b.op(
        "MoE",
        x,
        logits,
        *(site.values.get(role) for role in ("w_in", "b_in", "w_out", "b_out")),
        domain=microsoft.DOMAIN,
        k=call.top_k,
        normalize_routing_weights=1,
        **microsoft.activation_attributes(call.act).attributes(),
    )
    return b.op("Mul", y, total)
