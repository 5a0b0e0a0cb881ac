"""A canonical graph as an ONNX model: ATen calls by the table of operators.py, moec ops by moec_ops.py.

Weights are named and have shapes, not values. A matrix that only linear layers read is stored transposed, as MatMul
takes it; experts are stored as their node takes them.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
import onnx_ir.passes.common as common
from torch.fx import GraphModule, Node

from moec.compiler.capture.captured import Captured
from moec.compiler.export.onnx import portable
from moec.compiler.export.onnx.api import PORTABLE
from moec.compiler.export.onnx.attention import Batch
from moec.compiler.export.onnx.builder import IR_VERSION, Builder
from moec.compiler.export.onnx.codes import CodedPart
from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.onnx.experts import Site, as_numbers, form_of, prepare
from moec.compiler.export.onnx.interface import LOGITS, MASK, TOKENS, Interface
from moec.compiler.export.onnx.moec_ops import MOEC_OPS, Context
from moec.compiler.export.onnx.operators import OPERATORS, aten
from moec.compiler.export.onnx.values import Values, dtype_of
from moec.passes.infra.base import layer_of
from moec.passes.ir.quantised import unrounded
from moec.passes.ir.weights import Weight, transpose, weights_of


@dataclasses.dataclass(frozen=True)
class Translated:
    """model: an onnx_ir.Model.  recipes: how each initialiser without values is made.  sites: the experts' nodes."""

    model: ir.Model
    recipes: dict[str, Weight | CodedPart]
    sites: tuple[Site, ...]


def translate(captured: Captured, interface: Interface, kind: str, opset: int) -> Translated:
    """Raises: ExportError: an op without an ONNX form, by name; experts that the kind of node cannot express."""
    gm = captured.graph_module
    sites = prepare(gm, kind)
    _refuse_unknown(gm)
    b = Builder(captured.info.model_type, opset)
    v = Values(b)
    batch = _inputs(v, gm, interface)
    recipes = _weights(v, gm, sites)
    context = Context(v, batch, sites, kind)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            _translate(v, node, context)
    _outputs(v, gm, interface, batch)
    functions = [portable.function(form, opset) for form in sorted({form_of(s) for s in sites.values()}, key=str)]
    model = ir.Model(
        b.graph,
        ir_version=IR_VERSION,
        functions=[ir.serde.deserialize_function(f) for f in functions] if kind == PORTABLE else [],
    )
    b.graph.opset_imports.update({node.domain: 1 for node in b.graph if node.domain})
    common.RemoveUnusedNodesPass()(model)
    kept = {name: weight for name, weight in recipes.items() if name in b.graph.initializers}
    return Translated(model, kept, tuple(sites.values()))


def _inputs(v: Values, gm: GraphModule, interface: Interface) -> Batch | None:
    """Declares the inputs; of a language model also what the ragged graph's inputs are."""
    given = {p.name: v.b.input(p.name, p.shape, p.dtype) for p in interface.inputs}
    placeholders = gm.graph.find_nodes(op="placeholder")
    if not interface.caches:
        v.of.update(zip(placeholders, given.values(), strict=True))
        return None
    pasts = {c.spec.name: given[c.past.name] for c in interface.caches}
    batch = Batch(v.b, given[TOKENS], given[MASK], pasts)
    ragged = batch.ragged()
    for node in placeholders:
        if node.name in ragged:
            v.of[node] = ragged[node.name]
        elif node.name == "slots" and any(getattr(u.target, "namespace", "") == "aten" for u in node.users):
            v.of[node] = batch.slots()
    return batch


def _weights(v: Values, gm: GraphModule, sites: dict[Node, Site]) -> dict[str, Weight | CodedPart]:
    """Declares the initialisers; those of experts as their nodes take them. What is stored narrow is widened."""
    recipes: dict[str, Weight | CodedPart] = {}
    values: dict[tuple[str, bool], ir.Value] = {}
    linear = _only_linear(gm)

    def declare(name: str, weight: Weight | CodedPart) -> ir.Value:
        while name in recipes:
            name += "_"
        recipes[name] = weight
        return v.b.weight(name, weight.shape, weight.dtype)

    for node in gm.graph.find_nodes(op="get_attr"):
        attribute = str(node.target)
        if all(user in sites for user in node.users):
            continue
        key = (attribute, attribute in linear)
        if key not in values:
            weight = weights_of(gm)[attribute]
            origin, stored = unrounded(weight), as_numbers(weight)
            name = str(origin.args[0]) if origin.op == "source" else attribute
            made = declare(f"{name}.transposed", transpose(stored, 0, 1)) if key[1] else declare(name, stored)
            values[key] = made if stored.dtype == weight.dtype else v.b.cast(made, weight.dtype)
        (v.matrices if key[1] else v.of)[node] = values[key]
    for site in sites.values():
        for role, tensor in site.stored.items():
            site.values[role] = declare(site.names[role], tensor)
    return recipes


def _only_linear(gm: GraphModule) -> set[str]:
    """Attributes that nothing reads but linear layers, as their matrix."""
    found: dict[str, bool] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        linear = all(
            u.target is aten.linear.default and u.args[1] is node and u.args[0] is not node for u in node.users
        )
        found[str(node.target)] = found.get(str(node.target), True) and linear
    return {name for name, linear in found.items() if linear}


def _translate(v: Values, node: Node, context: Context) -> None:
    emit = MOEC_OPS.get(node.target)
    if emit is not None:
        v.of[node] = emit(context, node)
    else:
        v.of[node] = OPERATORS[node.target](v, node, *node.args, **node.kwargs)
    made = v.of[node]
    if isinstance(made, ir.Value) and made.name is None:
        made.name = node.name


def _outputs(v: Values, gm: GraphModule, interface: Interface, batch: Batch | None) -> None:
    returned = gm.graph.output_node().args[0]
    if batch is None:
        nodes = list(returned) if isinstance(returned, (tuple, list)) else [returned]
        for name, node in zip(interface.outputs, nodes, strict=True):
            v.b.output(v.tensor(node), name, None, dtype_of(node))
        return
    if not isinstance(returned, Node):
        raise ExportError("the graph gives no logits")
    vocabulary = int(returned.meta["val"].shape[-1])
    logits = batch.reshape(v.tensor(returned), "B", "S", vocabulary)
    v.b.output(logits, LOGITS, (*interface.inputs[0].shape, vocabulary), dtype_of(returned))
    for cache in interface.caches:
        v.b.output(batch.presents[cache.spec.name], cache.present.name, cache.present.shape, cache.present.dtype)


def _refuse_unknown(gm: GraphModule) -> None:
    """Raises: ExportError: operators without a form in ONNX, all of them by name."""
    unknown: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target not in OPERATORS and node.target not in MOEC_OPS:
            layer = layer_of(node)
            unknown.setdefault(str(node.target), node.name if layer is None else f"layer {layer}, {node.name}")
    if unknown:
        named = "; ".join(f"{target} ({where})" for target, where in unknown.items())
        raise ExportError(f"no ONNX form for {named}; moec compile runs this model")
