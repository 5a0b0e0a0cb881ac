"""Other ways of running the same layer in bf16, from the same experts and weights: what kernels are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from layer import Layer
from torch import Tensor
from torch.nn import functional as F

Step = Callable[[], Tensor]


def _sorted_slots(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Token and weight of each slot, expert by expert, shared ones last; slots per expert."""
    shape, n = layer.shape, layer.num_tokens
    device = layer.x.device
    shared = torch.arange(shape["num_experts"], shape["num_experts"] + shape["num_shared"], device=device)
    experts = torch.cat([layer.experts.long(), shared.expand(n, -1)], 1).reshape(-1)
    ones = torch.ones(n, shape["num_shared"], device=device)
    weights = torch.cat([layer.route_weights, ones], 1).reshape(-1)
    order = torch.sort(experts, stable=True).indices
    stacked = shape["num_experts"] + shape["num_shared"]
    return order // layer.slots_per_token, weights[order], torch.bincount(experts, minlength=stacked)


def grouped_mm(layer: Layer) -> Step:
    """torch._grouped_mm for both GEMMs, sorting and gathering included."""
    w_in, w_out = layer.weights["gate_up"].transpose(1, 2), layer.weights["down"].transpose(1, 2)

    def step() -> Tensor:
        token, weight, counts = _sorted_slots(layer)
        offsets = counts.cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(layer.x[token], w_in, offs=offsets).chunk(2, -1)
        rows = torch._grouped_mm(F.silu(gate) * up, w_out, offs=offsets)
        y = torch.zeros(layer.x.shape, device=layer.x.device)
        return y.index_add_(0, token, rows.float() * weight[:, None]).bfloat16()

    return step


def expert_by_expert(layer: Layer) -> Step:
    """A dense GEMM for each expert (cuBLAS); the host waits for the counts."""
    w_in, w_out = layer.weights["gate_up"], layer.weights["down"]

    def step() -> Tensor:
        token, weight, counts = _sorted_slots(layer)
        y, at = torch.zeros(layer.x.shape, device=layer.x.device), 0
        for e, count in enumerate(counts.tolist()):
            if count:
                mine = slice(at, at + count)
                gate, up = F.linear(layer.x[token[mine]], w_in[e]).chunk(2, -1)
                rows = F.linear(F.silu(gate) * up, w_out[e])
                y.index_add_(0, token[mine], rows.float() * weight[mine, None])
                at += count
        return y.bfloat16()

    return step


PEERS: dict[str, Callable[[Layer], Step]] = {"torch._grouped_mm": grouped_mm, "expert by expert": expert_by_expert}
