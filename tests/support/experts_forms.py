"""Experts spelled out in ATen: `FORMS[name](m, x)` -> y, each with the routing of moe_block.softmax_route.

Sources: transformers' batched_mm and grouped_mm, Llama 4's dense form, and what people write in their own blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gate_spellings import E, K
from moe_block import softmax_route
from torch import Tensor
from torch.nn import functional as F


def _swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def gathered(m: Any, x: Tensor) -> Tensor:
    """One row of weights per slot, batched products."""
    weights, experts = softmax_route(m, x)
    slots = experts.reshape(-1)
    rows = x.repeat_interleave(K, 0)
    h = _swiglu(torch.bmm(m.w_in[slots], rows.unsqueeze(-1)).squeeze(-1))
    y = torch.bmm(m.w_out[slots], h.unsqueeze(-1)).squeeze(-1) * weights.reshape(-1, 1)
    return y.view(x.shape[0], K, -1).sum(1)


def gathered_with_biases(m: Any, x: Tensor) -> Tensor:
    """As gathered, gate and up rows in turn, clamped, with biases."""
    weights, experts = softmax_route(m, x)
    slots = experts.flatten()
    rows = x.repeat_interleave(K, 0).unsqueeze(1)
    h = torch.bmm(rows, m.w_in[slots].transpose(1, 2)).squeeze(1) + m.b_in[slots]
    gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(min=-7.0, max=7.0)
    h = (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    y = torch.bmm(h.unsqueeze(1), m.w_out[slots].transpose(1, 2)).squeeze(1) + m.b_out[slots]
    return (y * weights.reshape(-1, 1)).view(x.shape[0], K, -1).sum(1)


def grouped(m: Any, x: Tensor) -> Tensor:
    """Slots sorted by expert, aten._grouped_mm (bf16)."""
    weights, experts = softmax_route(m, x)
    flat = experts.reshape(-1)
    ordered, order = torch.sort(flat)
    ends = torch.histc(ordered.float(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)
    rows = x[order // K]
    h = _swiglu(torch._grouped_mm(rows, m.w_in.transpose(1, 2), offs=ends))
    y = torch._grouped_mm(h, m.w_out.transpose(1, 2), offs=ends) * weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return y[back].view(x.shape[0], K, -1).sum(1).to(x.dtype)


def _dense(m: Any, x: Tensor) -> Tensor:
    """The routing weights of all experts [T, E], 0 where not chosen."""
    weights, experts = softmax_route(m, x)
    dense = torch.zeros(x.shape[0], E, dtype=weights.dtype)
    return dense.scatter(1, experts, weights)


def dense_on_input(m: Any, x: Tensor) -> Tensor:
    """Llama 4: all experts on all tokens, the weight on the input."""
    rows = x.repeat(E, 1) * _dense(m, x).t().reshape(-1, 1)
    h = _swiglu(torch.bmm(rows.view(E, -1, x.shape[-1]), m.w_in.transpose(1, 2)))
    return torch.bmm(h, m.w_out.transpose(1, 2)).sum(0)


def dense_einsum(m: Any, x: Tensor) -> Tensor:
    """All experts by einsum, combined by the dense weights."""
    h = _swiglu(torch.einsum("th,efh->tef", x, m.w_in))
    return torch.einsum("tef,ehf,te->th", h, m.w_out, _dense(m, x))


def dense_matmul(m: Any, x: Tensor) -> Tensor:
    """Broadcast matmul over the stack, masked sum."""
    h = _swiglu(torch.matmul(x.unsqueeze(0), m.w_in.transpose(1, 2)))
    y = torch.matmul(h, m.w_out.transpose(1, 2))  # [E, T, H]
    return (y * _dense(m, x).t().unsqueeze(-1)).sum(0)


def dense_bmm_with_biases(m: Any, x: Tensor) -> Tensor:
    """Batched products on all tokens, biases along an axis of size 1."""
    h = torch.bmm(x.unsqueeze(0).expand(E, -1, -1), m.w_in.transpose(1, 2)) + m.b_in[:, None]
    y = torch.bmm(_swiglu(h), m.w_out.transpose(1, 2)) + m.b_out[:, None]
    return (y * _dense(m, x).t()[..., None]).sum(0)


def one_hot(m: Any, x: Tensor) -> Tensor:
    """GShard's form: one-hot masks, einsum dispatch and combine."""
    weights, experts = softmax_route(m, x)
    mask = F.one_hot(experts, E).to(x.dtype)  # [T, K, E]
    combine = torch.einsum("tk,tke->te", weights, mask)
    h = _swiglu(torch.einsum("th,efh->etf", x, m.w_in))
    return torch.einsum("te,eth->th", combine, torch.einsum("etf,ehf->eth", h, m.w_out))


def unrolled(m: Any, x: Tensor) -> Tensor:
    """A loop over experts, every one on all tokens, masked by comparison."""
    weights, experts = softmax_route(m, x)
    y = torch.zeros_like(x)
    for e in range(E):
        weight = torch.where(experts == e, weights, 0.0).sum(-1, keepdim=True)
        h = _swiglu(F.linear(x, m.w_in[e]))
        y = y + F.linear(h, m.w_out[e]) * weight
    return y


def unrolled_separately(m: Any, x: Tensor) -> Tensor:
    """A loop with gate and up as two products and the up half stored first."""
    weights, experts = softmax_route(m, x)
    inner = m.w_out.shape[2]
    total = 0
    for e in range(E):
        chosen = (experts == e).to(weights.dtype)
        up, gate = F.linear(x, m.w_in[e, :inner]), F.linear(x, m.w_in[e, inner:])
        total = total + (weights * chosen).sum(-1, keepdim=True) * F.linear(F.gelu(gate) * up, m.w_out[e])
    return total


def without_gate(m: Any, x: Tensor) -> Tensor:
    """Two products with a squared ReLU in between."""
    h = torch.einsum("th,efh->tef", x, m.w_in[:, : m.w_out.shape[2]]).relu().square()
    return torch.einsum("tef,ehf,te->th", h, m.w_out, _dense(m, x))


def _expert(m: Any, e: int, x: Tensor) -> Tensor:
    """One expert with parameters of its own."""
    gate, up, down = (getattr(m, f"{kind}_{e}") for kind in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def module_list(m: Any, x: Tensor) -> Tensor:
    """A loop over modules, each on all tokens."""
    weights, experts = softmax_route(m, x)
    y = torch.zeros_like(x)
    for e in range(E):
        y = y + _expert(m, e, x) * ((experts == e) * weights).sum(-1, keepdim=True)
    return y


def module_list_stacked(m: Any, x: Tensor) -> Tensor:
    """All modules' outputs stacked, combined by the dense weights."""
    outputs = torch.stack([_expert(m, e, x) for e in range(E)], 1)
    return torch.einsum("te,teh->th", _dense(m, x), outputs)


def best_only(m: Any, x: Tensor) -> Tensor:
    """Switch: the best expert alone, by argmax."""
    scores = F.linear(x, m.router).softmax(-1)
    best = scores.argmax(-1)
    weight = scores.gather(1, best[:, None])
    return sum((best == e)[:, None] * weight * _expert(m, e, x) for e in range(E))  # type: ignore[return-value]


def behind_a_norm(m: Any, x: Tensor) -> Tensor:
    """A block with its norm, a router that sees a scaled input, and the residual."""
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    weights, experts = softmax_route(m, normed * 0.25)
    y = torch.zeros_like(x)
    for e in range(E):
        y = y + _expert(m, e, normed) * torch.where(experts == e, weights, 0.0).sum(-1, keepdim=True)
    return x + y


FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        gathered,
        gathered_with_biases,
        grouped,
        dense_on_input,
        dense_einsum,
        dense_matmul,
        dense_bmm_with_biases,
        one_hot,
        unrolled,
        unrolled_separately,
        without_gate,
        module_list,
        module_list_stacked,
        best_only,
        behind_a_norm,
    )
}
