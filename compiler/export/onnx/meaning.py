"""A canonical graph as a module with the exported model's inputs, which torch.export and torch.onnx can translate.

Each ATen call is made as it stands. A moec op becomes its plain meaning (gates, norms, rotations), attention over a batch
of rows (attention.py), or one node (experts.py). Parameters are meta tensors; `names` says what they are called in the
file, `recipes` how they are made. A matrix that only linear layers read is stored transposed, as MatMul takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from moec.compiler.capture.captured import Captured
from moec.compiler.export.onnx import attention, experts
from moec.compiler.export.onnx.batch import Batch, CacheName
from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.onnx.interface import Interface
from moec.passes.infra.base import layer_of
from moec.passes.ir import ops
from moec.passes.ir.gate import GateSpec
from moec.passes.ir.weights import Weight, transpose, weights_of

aten, moec = torch.ops.aten, torch.ops.moec
PLAIN: dict[Any, Callable[..., Any]] = {
    moec.gate.default: lambda logits, bias, spec: GateSpec.decode(spec).apply(logits, bias),
    moec.rms_norm.default: lambda x, *settings: ops.normalise(x, *settings).to(x.dtype),
    moec.rope.default: ops.rotate,
    aten.view.default: torch.reshape,  # what stood before it may have had other strides
    aten._unsafe_view.default: torch.reshape,
}
ATTENTION: dict[Any, Callable[..., Tensor]] = {
    moec.cached_attention.default: attention.cached_attention,
    moec.biased_attention.default: attention.biased_attention,
    moec.latent_attention.default: attention.latent_attention,
}
META = torch.device("meta")


class OnnxModule(nn.Module):
    """Called with the interface's inputs; gives its outputs as a tuple.

    Raises: ExportError: an op without an ONNX form, by name.
    """

    def __init__(self, captured: Captured, interface: Interface, kind: str) -> None:
        super().__init__()
        self._graphs = (captured.graph_module,)  # in a tuple, so that it is no submodule
        self.interface, self.kind = interface, kind
        self.sites = experts.prepare(captured.graph_module, kind)
        self.recipes: dict[str, Weight] = {}
        self.names: dict[str, str] = {}
        self._attributes: dict[tuple[str, bool], str] = {}
        self._transposed = _only_linear(captured.graph_module)
        self._add_weights(captured.graph_module)
        _refuse_unknown(captured.graph_module)

    @property
    def graph_module(self) -> GraphModule:
        return self._graphs[0]

    def _add_weights(self, gm: GraphModule) -> None:
        """Registers every weight that is read elsewhere than by experts, and the experts' as their nodes take them."""
        weights = weights_of(gm)
        for node in gm.graph.find_nodes(op="get_attr"):
            attribute = str(node.target)
            if attribute in self._attributes or all(user in self.sites for user in node.users):
                continue
            weight, name = weights[attribute], attribute
            if weight.op == "source":
                name = str(weight.args[0])
            if attribute in self._transposed:
                weight, name = transpose(weight, 0, 1), f"{name}.transposed"
            self._attributes[attribute] = self._register(name, weight)
        for site in self.sites.values():
            for role, weight in site.stored.items():
                self._register(site.names[role], weight)

    def _register(self, name: str, weight: Weight) -> str:
        """The attribute of a new initialiser, which is registered as a meta buffer."""
        attribute = f"w{len(self.names)}"
        taken = set(self.names.values())
        while name in taken:
            name += "_"
        self.register_buffer(attribute, torch.empty(weight.shape, dtype=weight.dtype, device=META))
        self.names[attribute], self.recipes[name] = name, weight
        return attribute

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        env: dict[Node, Any] = {}
        batch = None
        placeholders = self.graph_module.graph.find_nodes(op="placeholder")
        if self.interface.caches:
            batch = Batch(inputs[0], inputs[1], self.interface.caches, inputs[2:])
            ragged = batch.ragged
            env |= {n: ragged.get(n.name, CacheName(n.name)) for n in placeholders}
        else:
            env |= dict(zip(placeholders, inputs, strict=True))
        result = self._run(env, batch)
        if batch is None:
            return tuple(result) if isinstance(result, (tuple, list)) else (result,)
        presents = [batch.present[port.spec.name] for port in self.interface.caches]
        return (batch.rows_of(result), *presents)

    def _run(self, env: dict[Node, Any], batch: Batch | None) -> Any:
        for node in self.graph_module.graph.nodes:
            if node.op == "call_function":
                env[node] = self._call(node, env, batch)
            elif node.op == "output":
                return map_aggregate(node.args[0], lambda a: self._value(a, env))
        raise ExportError("the graph has no output")

    def _call(self, node: Node, env: dict[Node, Any], batch: Batch | None) -> Any:
        if node in self.sites:
            site = self.sites[node]
            attribute = {name: a for a, name in self.names.items()}
            stacks = {role: getattr(self, attribute[name]) for role, name in site.names.items()}
            return experts.trace(site, lambda n: self._value(n, env), stacks, self.kind)
        args = [map_aggregate(a, lambda v: self._value(v, env)) for a in node.args]
        kwargs = {k: map_aggregate(a, lambda v: self._value(v, env)) for k, a in node.kwargs.items()}
        if node.target is aten.linear.default and str(getattr(node.args[1], "target", "")) in self._transposed:
            x, w, *bias = args
            y = torch.matmul(x, w)
            return y + bias[0] if bias and bias[0] is not None else y
        if node.target in ATTENTION and batch is not None:
            return ATTENTION[node.target](batch, *args, **kwargs)
        return PLAIN.get(node.target, node.target)(*args, **kwargs)

    def _value(self, arg: Any, env: dict[Node, Any]) -> Any:
        """What an argument stands for; every device is the trace's."""
        if isinstance(arg, torch.device):
            return META
        if not isinstance(arg, Node):
            return arg
        return getattr(self, self._attributes[str(arg.target)]) if arg.op == "get_attr" else env[arg]


def _only_linear(gm: GraphModule) -> set[str]:
    """Attributes that nothing reads but linear layers, as their matrix."""
    found: dict[str, bool] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        linear = all(u.target is aten.linear.default and u.args[1] is node and node not in u.args[2:] for u in node.users)
        found[str(node.target)] = found.get(str(node.target), True) and linear
    return {name for name, linear in found.items() if linear}


def _refuse_unknown(gm: GraphModule) -> None:
    """Raises: ExportError: a moec op without a form in ONNX."""
    known = {moec.experts.default, *PLAIN, *ATTENTION}
    for node in gm.graph.find_nodes(op="call_function", sort=False):
        if getattr(node.target, "namespace", "") == "moec" and node.target not in known:
            layer = layer_of(node)
            where = node.name if layer is None else f"layer {layer}, {node.name}"
            raise ExportError(f"{where}: {node.target} has no ONNX form; moec compile runs this model")
