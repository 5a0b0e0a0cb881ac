"""Routed experts by library calls: slots sorted by expert, one linear per expert in use, a weighted sum per token.

S slots; slot t*(K+s)+k is token t's k-th expert, its k >= K the shared ones. Sums are in float32, rounded once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.runtime.launch.activation import activation
from moec.runtime.launch.stored import StoredStack, linear


def experts(
    act: str,
    num_shared: int = 0,
    weight_on_input: bool = False,
    transposed: bool = False,
    interleaved: bool = False,
) -> Callable[..., Tensor]:
    """-> f(x [T,H], weights [T,K], experts int[T,K], w_gate_up [E+s,2F,H], w_down [E+s,H,F], b_gate_up?, b_down?,
    shared_weight [T]?) -> y [T,H].

    transposed, interleaved: stacks as some checkpoints store them, [E,H,2F] and gate and up in turn. An index that is
    no routed expert adds nothing.
    """
    act_fn = activation(act, interleaved)

    def apply(
        x: Tensor, weights: Tensor, index: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None = None,
        b_out: Tensor | None = None, shared_weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        def one(e: int, rows: Tensor) -> Tensor:
            w1, w2 = (w_in[e].t(), w_out[e].t()) if transposed else (w_in[e], w_out[e])
            h = act_fn(F.linear(rows, w1, None if b_in is None else b_in[e]))
            return F.linear(h, w2, None if b_out is None else b_out[e])

        num_routed = w_in.shape[0] - num_shared
        return summed(one, x, weights, index, num_routed, num_shared, shared_weight, weight_on_input)

    return apply


def stored_experts(
    act: str,
    gate_up: Sequence[dict[str, Any]],
    down: Sequence[dict[str, Any]],
    shapes: Sequence[Sequence[int]],
    num_shared: int = 0,
    weight_on_input: bool = False,
) -> Callable[..., Tensor]:
    """As `experts`, with the two stacks as u8[..] of launch/stored.py; one expert's matrices at a time are numbers.

    gate_up, down: one format, or one for each expert. shapes: [E+s,2F,H] and [E+s,H,F].
    """
    act_fn = activation(act)
    (count, rows_in, columns_in), (_, rows_out, columns_out) = shapes
    stack_in = StoredStack(gate_up, rows_in, columns_in, count)
    stack_out = StoredStack(down, rows_out, columns_out, count)

    def apply(
        x: Tensor, weights: Tensor, index: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None = None,
        b_out: Tensor | None = None, shared_weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        def one(e: int, rows: Tensor) -> Tensor:
            w1 = stack_in.read(w_in, e, x.dtype)
            h = act_fn(linear(rows, w1, None if b_in is None else b_in[e], stack_in.layouts[e].act))
            del w1
            w2 = stack_out.read(w_out, e, x.dtype)
            return linear(h, w2, None if b_out is None else b_out[e], stack_out.layouts[e].act)

        return summed(one, x, weights, index, count - num_shared, num_shared, shared_weight, weight_on_input)

    return apply


def summed(
    one: Callable[[int, Tensor], Tensor],
    x: Tensor,
    weights: Tensor,
    index: Tensor,
    num_routed: int,
    num_shared: int = 0,
    shared_weight: Tensor | None = None,
    weight_on_input: bool = False,
    width: int | None = None,
) -> Tensor:
    """The weighted sum of experts per token -> [T,L]. one: (expert, rows [n,H]) -> [n,L]; width: L, None: H."""
    flat = index.reshape(-1)
    order = torch.sort(flat, stable=True)[1]  # [T*K]
    counts = torch.bincount(flat.clamp(max=num_routed), minlength=num_routed + 1).tolist()
    token = order // index.shape[1]
    factor = weights.reshape(-1)[order].unsqueeze(1)  # [T*K, 1]
    y = torch.zeros(x.shape[0], x.shape[1] if width is None else width, dtype=_wide(x), device=x.device)
    rows = x[token]
    if weight_on_input:
        rows = (rows * factor).to(x.dtype)
    start = 0
    for e, count in enumerate(counts[:num_routed]):
        if count:
            stop = start + count
            h = one(e, rows[start:stop]).to(y.dtype)
            y.index_add_(0, token[start:stop], h if weight_on_input else h * factor[start:stop])
            start = stop
    for e in range(num_routed, num_routed + num_shared):
        if shared_weight is None:
            y += one(e, x)
        elif weight_on_input:
            y += one(e, (x * shared_weight[:, None]).to(x.dtype))
        else:
            y += one(e, x).to(y.dtype) * shared_weight[:, None]
    return y.to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dispatch(num_experts: int, num_shared: int = 0) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """-> f(experts int[T,K]) -> slot_order i32[S] (expert by expert, in slot order), expert_start i32[E+s+1].

    Slots of an index that is no routed expert come last, after expert_start's end.
    """

    def sort(index: Tensor) -> tuple[Tensor, Tensor]:
        if num_shared:
            index = index.masked_fill(index >= num_experts, num_experts + num_shared)
            shared = torch.arange(num_experts, num_experts + num_shared, dtype=index.dtype, device=index.device)
            index = torch.cat([index, shared.expand(index.shape[0], num_shared)], 1)
        flat = index.reshape(-1)
        start = torch.zeros(num_experts + num_shared + 1, dtype=torch.int32, device=index.device)
        counts = torch.bincount(flat, minlength=num_experts + num_shared)[: num_experts + num_shared]
        torch.cumsum(counts, 0, out=start[1:])
        return torch.sort(flat, stable=True)[1].to(torch.int32), start

    return sort


def grouped_gemm(slots_per_token: int, act: str) -> Callable[..., Tensor]:
    """-> f(x [T,H], w [E,2F,H], bias?, slot_order [S], expert_start [E+1], slot_weight [S]?) -> h [S,F] in order."""
    act_fn = activation(act)

    def apply(
        x: Tensor, w: Tensor, bias: Tensor | None, slot_order: Tensor, expert_start: Tensor, slot_weight: Tensor | None
    ) -> Tensor:
        rows = x[slot_order // slots_per_token]
        if slot_weight is not None:
            rows = (rows * slot_weight[slot_order].unsqueeze(1)).to(x.dtype)
        bounds = expert_start.tolist()
        parts = [
            act_fn(F.linear(rows[a:b], w[e], None if bias is None else bias[e]))
            for e, (a, b) in enumerate(itertools.pairwise(bounds))
            if b > a
        ]
        unheld = rows.shape[0] - bounds[-1]
        if unheld or not parts:
            parts.append(act_fn(x.new_zeros(unheld, w.shape[1])))
        return torch.cat(parts)

    return apply


def combine_gemm(slots_per_token: int) -> Callable[..., Tensor]:
    """-> f(h [S,F] in slot_order, w [E,H,F], bias?, slot_order, expert_start, slot_weight [S]?) -> y [T,H]."""

    def apply(
        h: Tensor, w: Tensor, bias: Tensor | None, slot_order: Tensor, expert_start: Tensor, slot_weight: Tensor | None
    ) -> Tensor:
        y = torch.zeros((h.shape[0] // slots_per_token, w.shape[1]), dtype=_wide(h), device=h.device)
        token = slot_order // slots_per_token
        factor = None if slot_weight is None else slot_weight[slot_order].unsqueeze(1)
        bounds = expert_start.tolist()
        for e, (a, b) in enumerate(itertools.pairwise(bounds)):
            if b > a:
                rows = F.linear(h[a:b], w[e], None if bias is None else bias[e]).to(y.dtype)
                y.index_add_(0, token[a:b], rows if factor is None else rows * factor[a:b])
        return y.to(h.dtype)

    return apply
