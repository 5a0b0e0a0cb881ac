"""Attention with a bias for each distance between a token and an earlier one, by torch calls, a sequence at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moec.runtime.batch import Batch, Run, first_visible, visible


def biased_attention(scale: float, window: int = 0) -> Callable[..., Tensor]:
    """-> f(batch, q [T,Q,D], k [T,C,D], v [T,C,Dv], bias [T,Q,E], sinks? [T,Q], k_cache, v_cache, slots, positions)
    -> [T,Q,Dv]; bias[t, h, d] counts for the key d tokens back. Scores in q's dtype, softmax in float32.
    """

    def attend(
        batch: Batch, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor | None, k_cache: Tensor,
        v_cache: Tensor, slots: Tensor, positions: Tensor,
    ) -> Tensor:  # fmt: skip
        k_cache[slots, positions] = k
        v_cache[slots, positions] = v
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        for run in batch.runs:
            first, rows = first_visible(run.position, window, 0), slice(run.start, run.stop)
            keys, values = k_cache[run.slot, first : run.end], v_cache[run.slot, first : run.end]
            scores = _scores(q[rows], keys, scale) + _added(bias[rows], run, first)  # [Q, t, n]
            keep = visible(torch.arange(run.position, run.end), first, run.end, window, 0)
            scores = scores.float().masked_fill(~keep, -math.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks[rows].t().float().unsqueeze(-1)], -1)
            weights = scores.softmax(-1)[..., : run.end - first].to(q.dtype)
            repeat = q.shape[1] // v.shape[1]
            out[rows] = torch.matmul(weights, values.transpose(0, 1).repeat_interleave(repeat, 0)).transpose(0, 1)
        return out

    return attend


def _scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """q [t,Q,D], keys [n,C,D] -> [Q,t,n]."""
    each = keys.permute(1, 2, 0).repeat_interleave(q.shape[1] // keys.shape[1], 0)  # [Q, D, n]
    return torch.matmul(q.transpose(0, 1), each) * scale


def _added(bias: Tensor, run: Run, first: int) -> Tensor:
    """bias [t,Q,E] -> [Q,t,n]: that of each key first..end, zero from distance E on."""
    back = torch.arange(run.position, run.end)[:, None] - torch.arange(first, run.end)
    extent = bias.shape[2]
    at = back.clamp(0, extent - 1).expand(bias.shape[1], -1, -1)
    return bias.transpose(0, 1).gather(2, at).masked_fill(back >= extent, 0.0)
