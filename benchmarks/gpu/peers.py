"""Other ways of running the same layer in bf16, from the same experts and weights: what kernels are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from layer import Layer
from torch import Tensor
from torch.nn import functional as F

Step = Callable[[], Tensor]
Time = Callable[[Callable[[], Any]], float]


def _sorted_slots(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Token and weight of each slot, expert by expert, those held elsewhere last; slots per expert."""
    experts, weights = layer.slot_experts_and_weights()
    order = torch.sort(experts, stable=True).indices
    return order // layer.slots_per_token, weights[order], layer.slots_of_experts(experts)


def grouped_mm(layer: Layer, time_us: Time) -> Step:
    """torch._grouped_mm for both GEMMs, sorting and gathering included."""
    w_in, w_out = layer.weights["gate_up"].transpose(1, 2), layer.weights["down"].transpose(1, 2)

    def step() -> Tensor:
        token, weight, counts = _sorted_slots(layer)
        offsets = counts.cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(layer.x[token], w_in, offs=offsets).chunk(2, -1)
        rows = torch._grouped_mm(F.silu(gate) * up, w_out, offs=offsets).float() * weight[:, None]
        held = torch.arange(len(token), device=token.device) < offsets[-1]  # rows past the last group are not written
        y = torch.zeros(layer.x.shape, device=layer.x.device)
        return y.index_add_(0, token, torch.where(held[:, None], rows, 0.0)).bfloat16()

    return step


def expert_by_expert(layer: Layer, time_us: Time) -> Step:
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


def triton(layer: Layer, time_us: Time) -> Step:
    """A fused MoE in Triton, tuned for this number of tokens. Raises: ImportError: no Triton."""
    from triton_moe import tuned

    return tuned(layer, time_us)


PEERS: dict[str, Callable[[Layer, Time], Step]] = {
    "torch._grouped_mm": grouped_mm,
    "expert by expert": expert_by_expert,
    "triton": triton,
}
WAITING = frozenset({"expert by expert"})
"""Peers whose host waits for the device; the others are timed in a CUDA graph, as our layers are."""
