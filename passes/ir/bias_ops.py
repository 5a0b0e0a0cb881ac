"""The moec op of attention with a bias for each distance between a token and an earlier one. Letters as in ops.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moec.passes.ir.sequences import sequences


@torch.library.custom_op("moec::biased_attention", mutates_args=("k_cache", "v_cache"))
def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    sinks: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    window: int = 0,
) -> Tensor:
    """As moec::cached_attention, with bias[t, h, d] added to the scaled score of the key that is d tokens back.

    q [T,Q,D], k [T,C,D], v [T,C,Dv], bias [T,Q,E] (zero from distance E on), sinks [T,Q], one more score for each query
    that has no value -> [T,Q,Dv]. Softmax in float32.
    """
    k_cache[slots, positions] = k
    v_cache[slots, positions] = v
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    repeat = q.shape[1] // k.shape[1]
    for s, rows, p, n in sequences(slots, positions):
        keys, values = (c[s, :n].repeat_interleave(repeat, 1) for c in (k_cache, v_cache))
        a = torch.einsum("qhd,khd->hqk", q[rows], keys) * scale
        back = p[:, None] - torch.arange(n)  # [q, n]
        seen = (back >= 0) & (back < window) if window else back >= 0
        at = back.clamp(0, bias.shape[2] - 1).expand(bias.shape[1], -1, -1)
        added = bias[rows].transpose(0, 1).gather(2, at)  # [Q, q, n]
        a = (a + added.masked_fill(back >= bias.shape[2], 0.0)).float().masked_fill(~seen, -math.inf)
        if sinks is not None:
            a = torch.cat([a, sinks[rows].t().float().unsqueeze(-1)], -1)
        out[rows] = torch.einsum("hqk,khd->qhd", a.softmax(-1)[..., :n].to(q.dtype), values)
    return out


@biased_attention.register_fake
def _(q, k, v, bias, sinks, k_cache, v_cache, slots, positions, scale, window=0):
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])
