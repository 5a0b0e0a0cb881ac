"""Experts that an ONNX file has as one node: com.microsoft.MoE, and moec's own; they become moec ops at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moec.compiler.errors import UnsupportedModel
from moec.passes.ir.activation import Activation
from moec.passes.ir.gate import GateSpec

PLAIN = {"relu": "relu", "gelu": "gelu", "silu": "silu", "identity": "identity"}


def moe(
    x: Tensor,
    router: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_bias: Tensor | None = None,
    fc3: Tensor | None = None,
    fc3_bias: Tensor | None = None,
    router_weights: Tensor | None = None,
    *,
    k: int = 1,
    activation_type: str = "relu",
    normalize_routing_weights: int = 0,
    use_sparse_mixer: int = 0,
    swiglu_fusion: int = 0,
    activation_alpha: float = 1.0,
    activation_beta: float = 0.0,
    swiglu_limit: float = math.inf,
) -> Tensor:
    """x [..,H], router [T,E] logits, fc1 [E,n,H], fc2 [E,H,F], fc3 [E,F,H] -> [..,H].

    router_weights [T,E]: given (QMoE), the router only chooses and these weigh.
    Raises: UnsupportedModel: a mode that ONNX Runtime ignores or computes in another way than it is described.
    """
    if use_sparse_mixer:
        raise UnsupportedModel(
            "use_sparse_mixer is set, which ONNX Runtime's CPU provider ignores; what is meant is open"
        )
    fused = activation_type == "swiglu"
    if fused != bool(swiglu_fusion) or (fused and fc3 is not None):
        raise UnsupportedModel(
            f"activation {activation_type} with swiglu_fusion={swiglu_fusion}{' and fc3' if fc3 is not None else ''}; "
            "swiglu is read with 1 (in turn) or 2 (gate first) and without fc3, others with 0"
        )
    w_in, b_in = (fc1, fc1_bias) if fc3 is None else (torch.cat([fc1, fc3], 1), _joined(fc1_bias, fc3_bias))
    if fused:
        act = _swiglu(activation_alpha, activation_beta, swiglu_limit)
    elif activation_type in PLAIN:
        act = str(Activation(PLAIN[activation_type], fc3 is not None))
    else:
        raise UnsupportedModel(f"activation_type is {activation_type!r}; read are swiglu, {', '.join(PLAIN)}")
    rows, logits = x.reshape(-1, x.shape[-1]), router.reshape(-1, fc1.shape[0])
    weights, chosen = _routed(logits, router_weights, k, bool(normalize_routing_weights))
    y = torch.ops.moec.experts(
        rows, weights, chosen, w_in, fc2, b_in, fc2_bias, None, act, 0, False, False, swiglu_fusion == 1
    )
    return y.reshape(x.shape)


def _joined(gate: Tensor | None, up: Tensor | None) -> Tensor | None:
    if (gate is None) != (up is None):
        raise UnsupportedModel("fc1 and fc3 have one bias between them; both or none are read")
    return None if gate is None or up is None else torch.cat([gate, up], 1)


def _swiglu(alpha: float, beta: float, limit: float) -> str:
    """gate * sigmoid(alpha * gate) * (up + beta), both clamped before. Raises: UnsupportedModel: no such activation."""
    bound = None if math.isinf(limit) else limit
    if alpha == 1 and beta == 0:
        return str(Activation("silu", True, bound))
    if beta == 1:
        return str(Activation("swigluoai", True, limit, alpha))
    raise UnsupportedModel(
        f"swiglu with alpha {alpha:g} and beta {beta:g}; read are 1 and 0, and any alpha with beta 1"
    )


def _routed(logits: Tensor, weights: Tensor | None, k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Weights f32[T,K] and experts [T,K]."""
    if weights is None:
        spec = GateSpec(k, renormalise=normalise)
        chosen = torch.ops.moec.gate(logits, None, spec.encode())
        return chosen[0], chosen[1]
    experts = torch.topk(logits, k, -1).indices
    taken = torch.gather(weights.reshape(logits.shape), 1, experts).float()
    return (taken / taken.sum(-1, keepdim=True) if normalise else taken), experts


def portable(op: str, x: Tensor, weights: Tensor, experts: Tensor, *stacks: Tensor, act: str, **told: Any) -> Tensor:
    """A node of the domain moec (compiler/export/onnx/portable.py): its name tells which biases it has.

    told: what it says of itself for readers.
    """
    words = op.split("_")
    biases = list(stacks[2:])
    b_out = biases.pop() if "out" in words else None
    b_in = biases.pop() if biases else None
    return torch.ops.moec.experts(
        x, weights, experts, stacks[0], stacks[1], b_in, b_out, None, act, 0, "weighted" in words
    )
