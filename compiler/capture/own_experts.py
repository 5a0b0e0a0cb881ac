"""Experts modules of transformers that loop over their experts themselves, in moec ops (see own_methods.py).

`_moec_activation` of a module is the IR name of its activation (activations.ACTIVATION).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

moec = torch.ops.moec


def longcat_flash_experts(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """hidden [T, H], index and weights [T, K] -> [T, H]; indices past the last expert mean the token itself.

    Source: LongCat-Flash technical report, section 2.1 (zero-computation experts).
    """
    num_experts = experts.num_routed_experts
    w_gate_up = experts.gate_up_proj[:num_experts]  # the stack has unused rows for the zero experts
    y = moec.experts(hidden, weights, index, w_gate_up, experts.down_proj, None, None, None, experts._moec_activation)
    if not experts.zero_expert_num:
        return y
    kept = (weights * (index >= num_experts)).sum(-1, keepdim=True)  # [T, 1]
    return y + (hidden * kept).to(hidden.dtype)


def dbrx_experts(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """hidden [.., H], index and weights [T, K] -> as hidden; all experts lie in one [E*F, H] matrix per projection."""
    shape = (experts.num_experts, experts.ffn_hidden_size, experts.hidden_size)
    w1, v1, w2 = (getattr(experts.mlp, name).view(shape) for name in ("w1", "v1", "w2"))  # [E, F, H]
    stacks = torch.cat([w1, v1], 1), w2.transpose(1, 2)
    flat = hidden.reshape(-1, experts.hidden_size)
    return moec.experts(flat, weights, index, *stacks, None, None, None, experts._moec_activation).view(hidden.shape)


def _jetmoe_route(router: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, H] -> weights [T, K], experts i64[T, K]."""
    logits, index = router.layer(x).float().topk(router.top_k, dim=1)
    return torch.softmax(logits, dim=1).type_as(x), index


def jetmoe_mlp(block: Any, layer_input: Tensor) -> Tensor:
    """layer_input [1, T, H] -> [1, T, H]."""
    x = layer_input.reshape(-1, block.input_size)
    weights, index = _jetmoe_route(block.router, x)
    stacks = block.input_linear.weight, block.output_linear.weight  # [E, 2F, H], [E, H, F]
    y = moec.experts(x, weights, index, *stacks, None, None, None, block._moec_activation)
    return y.view(layer_input.shape) + block.bias


def jetmoe_queries(block: Any, layer_input: Tensor) -> tuple[Tensor, None, tuple[Tensor, ...]]:
    """layer_input [1, T, H] -> the queries of each token's experts [1, T, K, F], and what jetmoe_outputs needs.

    Mixture of attention heads: an expert is a pair of a query and an output projection. Source: JetMoE, section 3.2.
    """
    x = layer_input.reshape(-1, block.input_size)
    weights, index = _jetmoe_route(block.router, x)
    order, start = moec.dispatch(index, block.num_experts)
    q = moec.grouped_gemm(x, block.input_linear.weight, None, order, start, None, block.top_k, "!identity")  # [S, F]
    slots = torch.zeros_like(q).index_copy(0, order.long(), q)
    q = slots.view(*layer_input.shape[:2], block.top_k, block.hidden_size)
    return q, None, (order, start, weights)


def jetmoe_outputs(block: Any, layer_input: Tensor, routing: tuple[Tensor, ...]) -> Tensor:
    """layer_input [1, T, K, F], what attention gave for each expert's queries -> [1, T, H]."""
    order, start, weights = routing
    rows = layer_input.reshape(-1, block.hidden_size).index_select(0, order.long())
    y = moec.combine_gemm(rows, block.output_linear.weight, None, order, start, weights.flatten(), block.top_k)
    return y.view(*layer_input.shape[:2], block.input_size) + block.bias
