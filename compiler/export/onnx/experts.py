"""Which node the experts of a layer become, and what goes into it.

prepare() reads the experts of a canonical graph into Sites and says which tensors their nodes take; emit() makes the
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
from moec.compiler.export.onnx.codes import CODES, SCALES, ZEROS, CodedPart, CodedStack, format_of
from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.onnx.values import Values
from moec.passes.infra.base import layer_of
from moec.passes.ir.activation import Activation
from moec.passes.ir.experts_call import ExpertsCall
from moec.passes.ir.formats import SCALE_NAMES, WeightFormat
from moec.passes.ir.quantised import formats_of, is_stored_quantised, refusal
from moec.passes.ir.weights import Weight, cast, reshape, transpose, weights_of

ROLES = {"w_in": "w_gate_up", "w_out": "w_down", "b_in": "b_gate_up", "b_out": "b_down"}
"""What a stack is called in the file -> the argument of moec::experts."""
STEMS = {CODES: "w", SCALES: "s", ZEROS: "z"}
"""Part of a stack that is stored as codes -> how its name begins: w_in, s_in, z_in."""


@dataclasses.dataclass(frozen=True)
class Site:
    """The experts of one layer.

    canonical: the recipes of the stacks by role (w_in [E,2F,H] gate half first, ..), in the dtype of the file.
    stored: the tensors of the file, as the node takes them: those, or parts of them (s_in, z_out, ..).
    names, values: of the initialisers, by role.  in_turn: gate and up rows are stored in turn.
    format: of both stacks where they are stored as codes, None: numbers.  note: why codes of the checkpoint are not.
    """

    node: Node
    call: ExpertsCall
    layer: int | None
    canonical: dict[str, Weight]
    stored: dict[str, Weight | CodedPart]
    in_turn: bool
    format: WeightFormat | None = None
    note: str = ""
    values: dict[str, ir.Value] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> dict[str, str]:
        """Of the initialisers in the file, by role."""
        stem = f"layers.{self.layer}.experts" if self.layer is not None else self.node.name
        return {role: f"{stem}.{role}" for role in self.stored}

    @property
    def num_experts(self) -> int:
        """Routed experts of the layer."""
        return self.call.num_routed

    @property
    def where(self) -> str:
        """Node and layer, as messages name them."""
        return where_of(self.node)

    @property
    def stored_as(self) -> str:
        """The name of the experts' format, or of their dtype."""
        if self.format is not None:
            return self.format.name
        dtype = self.canonical["w_in"].dtype
        return SCALE_NAMES.get(dtype, str(dtype))


def where_of(node: Node) -> str:
    """A node and its layer, as messages name them."""
    layer = layer_of(node)
    return f"layer {layer}, {node.name}" if layer is not None else node.name


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
    call, where = ExpertsCall.of(node), where_of(node)
    if call.transposed or call.interleaved or call.num_shared:
        raise ExportError(f"{where}: the experts are not in canonical form; this is a defect of moec, please report it")
    canonical = stacks_of(gm, call, where)
    format, note = _coding(canonical, kind, where)
    in_turn = kind == MICROSOFT and Activation.parse(call.act).gated
    if format is None:
        canonical = {role: as_numbers(w) for role, w in canonical.items()}
    stored: dict[str, Weight | CodedPart] = {}
    for role, weight in canonical.items():
        turned = in_turn and role.endswith("_in")
        if format is not None and role.startswith("w_"):
            parts = CodedStack(weight, turned).parts()
            stored |= {role.replace("w", STEMS[part], 1): tensor for part, tensor in parts.items()}
        else:
            stored[role] = _in_turn(weight) if turned else weight
    return Site(node, call, layer_of(node), canonical, stored, in_turn, format, note)


def stacks_of(gm: GraphModule, call: ExpertsCall, where: str) -> dict[str, Weight]:
    """The stacks and biases of one layer's experts, by role. Raises: ExportError: the graph computes one of them."""
    found: dict[str, Weight] = {}
    for role, argument in ROLES.items():
        operand = getattr(call, argument)
        if operand is None:
            continue
        weight = weights_of(gm).get(str(operand.target)) if operand.op == "get_attr" else None
        if weight is None:
            raise ExportError(
                f"{where}: the graph computes {operand.name}; experts are written from stored weights only"
            )
        found[role] = weight
    return found


def _coding(canonical: dict[str, Weight], kind: str, where: str) -> tuple[WeightFormat | None, str]:
    """The format of both stacks where the node can hold their codes, else why it does not hold those of the checkpoint.

    Raises: ExportError: they were quantised for this file, and it cannot.
    """
    w_in, w_out = canonical["w_in"], canonical["w_out"]
    of_in, of_out = format_of(w_in), format_of(w_out)
    if of_in is None or of_out is None:
        coded = dict.fromkeys(f.name for w in (w_in, w_out) for f in formats_of(w) if not f.is_plain)
        unknown = [refusal(w) for w in (w_in, w_out) if is_stored_quantised(w)]
        return None, f"{', '.join(coded)} has no codes in ONNX" if coded else (unknown or [""])[0]
    if kind == MICROSOFT:
        reason = microsoft.qmoe_refusal(of_in, of_out)
    else:
        reason = "" if of_in == of_out else f"{of_in.name} and {of_out.name} in one layer"
    if not reason:
        return of_in, ""
    if is_stored_quantised(w_in) and is_stored_quantised(w_out):
        return None, reason
    raise ExportError(f"{where}: {reason}; choose such a format{', or --experts portable' * (kind == MICROSOFT)}")


def as_numbers(weight: Weight) -> Weight:
    """The weight in the plain dtype that was asked for, else in its own."""
    formats = formats_of(weight)
    return cast(weight, formats[0].dtype) if len(formats) == 1 and formats[0].is_plain else weight


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
    return portable.Form(
        site.call.act,
        "b_in" in site.names,
        "b_out" in site.names,
        site.call.weight_on_input,
        site.format,
        site.canonical["w_in"].dtype.itemsize < site.call.dtype.itemsize,
    )


def _portable(v: Values, site: Site) -> ir.Value:
    form, call = form_of(site), site.call
    given = {"x": v.tensor(call.x), "weights": v.tensor(call.weights, torch.float32), "experts": v.tensor(call.experts)}
    attributes: dict[str, Any] = {"act": call.act, "num_experts": site.num_experts, "top_k": call.top_k}
    if site.layer is not None:
        attributes["layer"] = site.layer
    if site.format is not None:
        attributes["format"] = site.format.name
    inputs = [(given | site.values)[name] for name in form.inputs]
    return v.b.op(form.name, *inputs, domain=portable.DOMAIN, **attributes)


def _microsoft(v: Values, site: Site) -> ir.Value:
    b, call = v.b, site.call
    x, weights = v.tensor(call.x, torch.float32), v.tensor(call.weights, torch.float32)
    if call.weight_on_input:  # of one expert: its weight goes into x, and counts 1 behind it
        x = b.op("Mul", x, weights)
        weights = b.op("Expand", b.number(1.0, torch.float32), b.op("Shape", weights))
    logits, total = microsoft.as_logits(b, weights, v.tensor(call.experts, torch.int64), site.num_experts)
    inputs = microsoft.MOE_INPUTS if site.format is None else microsoft.QMOE_INPUTS
    codes = {} if site.format is None else microsoft.qmoe_attributes(site.format)
    given = {"x": x, "logits": logits, **{role: _wide(v, value) for role, value in site.values.items()}}
    y = b.op(
        "MoE" if site.format is None else "QMoE",
        *(given.get(role) for role in inputs),
        domain=microsoft.DOMAIN,
        k=call.top_k,
        normalize_routing_weights=1,
        **microsoft.activation_attributes(call.act).attributes(),
        **codes,
    )
    y = b.op("Mul", y, total)
    return y if call.dtype is torch.float32 else b.cast(y, call.dtype)


def _wide(v: Values, value: ir.Value) -> ir.Value:
    """Weights that are stored in half the width, as float32."""
    return v.b.cast(value, torch.float32) if value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) else value
