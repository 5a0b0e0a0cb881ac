"""Experts as com.microsoft.MoE and QMoE, within what ONNX Runtime's CPU provider computes rightly.

Measured with ONNX Runtime 1.31.1 (docs/onnx.md): the fused gate is taken in turn with up (swiglu_fusion=1) and in no
other layout; a third matrix (fc3) is refused; `use_sparse_mixer` is accepted and ignored. So what is written is
fc1 = gate and up in turn [E,2F,H], fc2 = [E,H,F], and plain top-k over router_probs.

MoE has no input for the weights of chosen experts, only logits: softmax over the k greatest. And among equal logits it
does not choose the lowest index, as every gate here does. So the gate stands in the graph, and its weights w >= 0 go in
as logits log(w), -1e30 for all others, which that softmax turns into w / sum(w); y is then multiplied by sum(w).
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
import torch

from moec.compiler.export.onnx.builder import Builder
from moec.compiler.export.onnx.errors import ExportError
from moec.passes.ir.activation import Activation
from moec.passes.ir.experts_call import ExpertsCall
from moec.passes.ir.formats import WeightFormat

DOMAIN, VERSION = "com.microsoft", 1
MIN_ONNXRUNTIME = "1.31"
"""Where it was measured. Before 1.28 its CUDA provider took GPT-OSS's constants for every swiglu."""
_LEAST = 1e-30
_ABSENT = -1e30
QMOE_GROUPS = {4: (16, 32, 64, 128, 256), 8: (0,)}
"""Bits of codes -> values that share a scale, 0: a row, with which QMoE was measured to be right."""
MOE_INPUTS = ("x", "logits", "w_in", "b_in", "w_out", "b_out")
QMOE_INPUTS = ("x", "logits", "w_in", "s_in", "b_in", "w_out", "s_out", "b_out", "", "", "", "z_in", "z_out")
"""What stands in each input of the nodes; "" in those of a third matrix, which the provider refuses."""
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
        """Of the ONNX node; what is None is left out."""
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
    if site.dtype not in (torch.float32, torch.float16):
        raise ExportError(
            f"{where}: {site.dtype} experts; ONNX Runtime's CPU provider has com.microsoft.MoE in float32, to which "
            "float16 is widened; use --experts portable"
        )
    if site.weight_on_input and site.top_k > 1:
        raise ExportError(
            f"{where}: the weights of {site.top_k} experts multiply their inputs, com.microsoft.MoE's its outputs; "
            "use --experts portable"
        )
    if site.num_shared:
        raise ExportError(f"{where}: shared experts among the routed ones; use --experts portable")


def qmoe_refusal(fc1: WeightFormat, fc2: WeightFormat) -> str:
    """Why QMoE cannot hold experts in these formats; "" where it can."""
    if (fc1.bits, fc1.group, fc1.symmetric) != (fc2.bits, fc2.group, fc2.symmetric):
        return f"{fc1.name} and {fc2.name} in one layer; com.microsoft.QMoE has one format for both products"
    if fc1.group in QMOE_GROUPS.get(int(fc1.bits), ()):
        return ""
    return (
        f"{fc1.name}: ONNX Runtime's CPU provider computes com.microsoft.QMoE rightly with int4 in groups of 16 to 256 "
        "and with int8 by rows; with others it rounds activations to 8 bits"
    )


def qmoe_attributes(format: WeightFormat) -> dict[str, int]:
    """What a QMoE node says of its codes."""
    given = {"expert_weight_bits": int(format.bits)}
    return given | ({"block_size": format.group} if format.group else {})


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
