"""Experts as com.microsoft.MoE, within what ONNX Runtime's CPU provider computes rightly.

Measured with ONNX Runtime 1.31.1 (docs/onnx.md): the fused gate is taken in turn with up (swiglu_fusion=1) and in no
other layout; a third matrix (fc3) is refused; `use_sparse_mixer` is accepted and ignored. So what is written is
fc1 = gate and up in turn [E,2F,H], fc2 = [E,H,F], and plain top-k over router_probs.

MoE has no input for the weights of chosen experts, only logits: softmax over the k greatest. Any weights w >= 0 are
given as logits log(w), -1e30 elsewhere, which that softmax turns into w / sum(w); y is then multiplied by sum(w). Where
the gate is softmax and top-k and nothing else, its own logits go in.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
import torch
from torch.fx import Node

from moec.compiler.export.onnx.builder import Builder
from moec.compiler.export.onnx.errors import ExportError
from moec.passes.ir.activation import Activation
from moec.passes.ir.experts_call import ExpertsCall
from moec.passes.ir.gate import GateSpec

DOMAIN, VERSION = "com.microsoft", 1
MIN_ONNXRUNTIME = "1.31"
"""Where it was measured. Before 1.28 its CUDA provider took GPT-OSS's constants for every swiglu."""
_LEAST = 1e-30
_ABSENT = -1e30
_PLAIN = {"relu": "relu", "silu": "silu", "identity": "identity"}


@dataclasses.dataclass(frozen=True)
class ActivationAttributes:
    """How com.microsoft.MoE names an activation."""

    activation_type: str
    swiglu_fusion: int = 0
    activation_alpha: float = 1.0
    activation_beta: float = 0.0
    swiglu_limit: float | None = None

    def attributes(self) -> dict[str, int | float | str]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


def activation_attributes(name: str) -> ActivationAttributes:
    """Raises: ExportError: MoE has no such activation, or ONNX Runtime computes another one."""
    act = Activation.parse(name)
    if not act.gated and act.limit is None and act.fn in _PLAIN:
        return ActivationAttributes(_PLAIN[act.fn])
    if act.gated and act.fn == "swigluoai":
        return ActivationAttributes("swiglu", 1, act.alpha, 1.0, act.limit)
    if act.gated and act.fn == "silu":
        return ActivationAttributes("swiglu", 1, 1.0, 0.0, act.limit)
    raise ExportError(
        f"activation {name}: com.microsoft.MoE has silu with a gate, swigluoai, and relu, silu and identity without; "
        "use --experts portable"
    )


def check(site: ExpertsCall, where: str) -> None:
    """Raises: ExportError: this layer of experts is outside of the subset; says why."""
    activation_attributes(site.act)
    if site.dtype is not torch.float32:
        raise ExportError(
            f"{where}: {site.dtype} experts; ONNX Runtime's CPU provider has MoE in float32: --weights f32"
        )
    if site.weight_on_input and site.top_k > 1:
        raise ExportError(
            f"{where}: the weights of {site.top_k} experts multiply their inputs, com.microsoft.MoE's its outputs; "
            "use --experts portable"
        )
    if site.num_shared:
        raise ExportError(f"{where}: shared experts among the routed ones; use --experts portable")


def own_logits(site: ExpertsCall) -> tuple[Node, bool, float] | None:
    """The gate's logits, whether it renormalises, and its scale, where MoE's own routing is the same; else None."""
    gates = {n.args[0] for n in (site.weights, site.experts) if n.op == "call_function" and len(n.args) == 2}
    gate = gates.pop() if len(gates) == 1 else None
    if not isinstance(gate, Node) or gate.target is not torch.ops.moec.gate.default:
        return None
    logits, bias, text = gate.args
    spec = GateSpec.decode(str(text))
    plain = dataclasses.replace(
        spec, renormalise=False, renorm_eps=0.0, order="score_then_topk", scale=1.0, compute_dtype="float32",
        weights_dtype="float32",
    )  # fmt: skip
    exact = spec.compute_dtype in ("float32", "logits") and spec.weights_dtype in ("float32", "logits")
    if plain != GateSpec(spec.top_k) or bias is not None or spec.renorm_eps > 1e-12 or not exact:
        return None
    renormalises = spec.renormalise or spec.order == "topk_then_score"
    return logits, renormalises, spec.scale  # type: ignore[return-value]


def as_logits(b: Builder, weights: ir.Value, experts: ir.Value, num_experts: int) -> tuple[ir.Value, ir.Value]:
    """weights f32[T,K] >= 0, experts i64[T,K] -> logits f32[T,E] for MoE with renormalising, and sum of weights [T,1].

    An index >= E is "not held here": its weight counts nowhere.
    """
    last, zero, least = (
        b.number(num_experts, torch.int64),
        b.number(0.0, torch.float32),
        b.number(_LEAST, torch.float32),
    )
    held = b.op("Less", experts, last)
    kept = b.op("Where", held, weights, zero)
    columns = b.shape(b.size(weights, 0), num_experts + 1)
    dense = b.op("ScatterElements", b.op("Expand", zero, columns), b.op("Min", experts, last), kept, axis=1)
    dense = b.slice(dense, 1, 0, num_experts)
    chosen = b.op("GreaterOrEqual", dense, least)
    logits = b.op("Where", chosen, b.op("Log", b.op("Max", dense, least)), b.number(_ABSENT, torch.float32))
    return logits, b.op("ReduceSum", kept, b.ints(1), keepdims=1)
