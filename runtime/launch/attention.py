"""Attention over the cache by library calls: one call for all decode rows of a batch, one per sequence for prefill.

The query heads that share a key head are folded into query rows, so that grouped-query attention needs no copy of keys.
Attention sinks are added after the fact: softmax over n keys and a sink is softmax over the keys times
sigmoid(logsumexp - sink).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.runtime.batch import Batch, Run, first_visible, visible

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def cached_attention(scale: float, window: int = 0, chunk: int = 0, softcap: float = 0.0) -> Callable[..., Tensor]:
    """-> f(batch, q [T,Q,D], k [T,C,D], v [T,C,Dv], k_cache [N,L,C,D], v_cache, slots, positions, sinks?) -> [T,Q,Dv].

    Writes k and v to the caches first. window, chunk, softcap: 0 means none. Scores and softmax in float32 or better.
    """

    def attend(
        batch: Batch, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
        positions: Tensor, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        k_cache[slots, positions] = k
        v_cache[slots, positions] = v

        def of_rows(first: int, end: int) -> tuple[Tensor, Tensor]:
            return rows_of(k_cache, batch, slots, first, end), rows_of(v_cache, batch, slots, first, end)

        def of_run(slot: int, first: int, end: int) -> tuple[Tensor, Tensor]:
            return k_cache[slot, first:end], v_cache[slot, first:end]

        return _attend_batch(batch, q, of_rows, of_run, sinks, scale, window, chunk, softcap)

    return attend


def cached_attention_int8(scale: float, window: int = 0, chunk: int = 0, softcap: float = 0.0) -> Callable[..., Tensor]:
    """As cached_attention, keys and values stored as codes i8[N,L,C,D], i8[N,L,C,Dv] with scales f32[N,L,C] each.

    -> f(batch, q, k, v, k_cache, v_cache, k_scales, v_scales, slots, positions, sinks?) -> [T,Q,Dv]. What is visible is
    brought to float32 in each call. scale of a row = max |x| / 127, codes to nearest even.
    """

    def attend(
        batch: Batch, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scales: Tensor,
        v_scales: Tensor, slots: Tensor, positions: Tensor, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        for new, cache, scales in ((k, k_cache, k_scales), (v, v_cache, v_scales)):
            cache[slots, positions], scales[slots, positions] = _to_codes(new)
        stored = (k_cache, k_scales), (v_cache, v_scales)

        def of_rows(first: int, end: int) -> tuple[Tensor, Tensor]:
            keys, values = (
                rows_of(codes, batch, slots, first, end).float()
                * rows_of(scales, batch, slots, first, end).unsqueeze(-1)
                for codes, scales in stored
            )
            return keys, values

        def of_run(slot: int, first: int, end: int) -> tuple[Tensor, Tensor]:
            keys, values = (c[slot, first:end].float() * s[slot, first:end].unsqueeze(-1) for c, s in stored)
            return keys, values

        return _attend_batch(batch, q.float(), of_rows, of_run, sinks, scale, window, chunk, softcap).to(q.dtype)

    return attend


def _to_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., D] -> codes i8[.., D], scales f32[..]; NaN and infinity make the scale tell."""
    wide = x.float()
    largest = wide.abs().amax(-1)
    inverse = torch.where(largest > 0, torch.full_like(largest, 127.0) / largest, 0.0)
    codes = (wide * inverse.unsqueeze(-1)).round().nan_to_num(0.0, 0.0, 0.0)
    return codes.to(torch.int8), largest / 127.0


Visible = Callable[..., tuple[Tensor, Tensor]]
"""Keys and values of a range of places: of all rows of a decode step, or of one sequence."""


def _attend_batch(
    batch: Batch, q: Tensor, of_rows: Visible, of_run: Visible, sinks: Tensor | None, scale: float, window: int,
    chunk: int, softcap: float,
) -> Tensor:  # fmt: skip
    """Attention of q [T,Q,D] over what of_rows(first, end) or of_run(slot, first, end) give -> [T,Q,Dv]."""
    if batch.is_decode:
        first, end, keep = batch.decode_mask(window, chunk)
        return _decode(q, *of_rows(first, end), keep, sinks, scale, softcap)
    parts = []
    for run in batch.runs:
        first = first_visible(run.position, window, chunk)
        rows = q[run.start : run.stop]
        keys, values = of_run(run.slot, first, run.end)
        mask = _run_mask(run, first, window, chunk, q.device)
        parts.append(_prefill(rows, keys, values, mask, sinks, scale, softcap))
    return torch.cat(parts)


def rows_of(cache: Tensor, batch: Batch, slots: Tensor, first: int, end: int) -> Tensor:
    """cache [N,L,..] -> [T, end - first, ..] of the rows' slots; a view where the rows are slots 0..T-1."""
    return cache[: batch.num_rows, first:end] if batch.slots_are_rows else cache[slots, first:end]


def _run_mask(run: Run, first: int, window: int, chunk: int, device: torch.device) -> Tensor | None:
    """bool[t, end - first] for one run, None where plain causal order says it all."""
    if first == run.position and not window and not chunk:
        return None
    return visible(torch.arange(run.position, run.end, device=device), first, run.end, window, chunk)


def _decode(
    q: Tensor, keys: Tensor, values: Tensor, keep: Tensor, sinks: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """q [T,Q,D], keys [T,n,C,D], values [T,n,C,Dv], keep [T,1,1,n] -> [T,Q,Dv]."""
    t, num_heads, _ = q.shape
    num_kv = keys.shape[2]
    folded = q.reshape(t, num_kv, num_heads // num_kv, q.shape[2])
    sink = None if sinks is None else sinks.view(1, num_kv, num_heads // num_kv)
    y = _attend(folded, keys.transpose(1, 2), values.transpose(1, 2), keep, sink, scale, softcap)
    return y.reshape(t, num_heads, values.shape[3]).contiguous()


def _prefill(
    q: Tensor, keys: Tensor, values: Tensor, keep: Tensor | None, sinks: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """q [t,Q,D], keys [n,C,D], values [n,C,Dv], keep bool[t,n] or None (causal, t == n) -> [t,Q,Dv]."""
    t, num_heads, _ = q.shape
    queries, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (q, keys, values))  # [1, heads, rows, D]
    if keep is None and sinks is None and not softcap:
        y = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
        return y[0].transpose(0, 1)
    if keep is None:
        keep = q.new_ones(t, t, dtype=torch.bool).tril()
    repeat = num_heads // keys.shape[1]
    keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
    sink = None if sinks is None else sinks.view(1, num_heads, 1)
    return _attend(queries, keys, values, keep[None, None], sink, scale, softcap)[0].transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, sink: Tensor | None, scale: float, softcap: float) -> Tensor:
    """q [B,h,r,D], k [B,h,n,D], v [B,h,n,Dv], keep bool broadcastable to [B,h,r,n], sink [1,h,r] or [1,h,1]."""
    # torch's flash attention divides by the number of rows
    if softcap or not q.numel() or (sink is not None and k.shape[3] != v.shape[3]):
        return _attend_plainly(q, k, v, keep, sink, scale, softcap)
    if sink is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale)
    if q.device.type != "cpu":
        return _attend_plainly(q, k, v, keep, sink, scale, softcap)
    mask = torch.zeros(keep.shape, dtype=q.dtype).masked_fill_(~keep, -math.inf)
    y, log_sum = _flash(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    return (y.float() * torch.sigmoid(log_sum - sink.float()).unsqueeze(-1)).to(q.dtype)


def _attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, sink: Tensor | None, scale: float, softcap: float
) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float().masked_fill(~keep, -math.inf)
    if sink is not None:
        column = sink.float().unsqueeze(-1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]].to(q.dtype)
    return torch.matmul(weights, v)
