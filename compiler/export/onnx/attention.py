"""Attention over past and present keys in plain batched PyTorch, which torch.onnx translates to standard operators.

Letters: B sequences, S new tokens of each, L keys of each, T = B*S, Q query heads, C kv heads, G = Q/C, D head width.
Meanings: moec::cached_attention, moec::biased_attention, moec::latent_attention (passes/ir). Scores and softmax are in
float32. What a query does not see gets the lowest finite score, so that a row of padding is finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.export.onnx.batch import Batch, CacheName


def cached_attention(
    batch: Batch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: CacheName,
    v_cache: CacheName,
    slots: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """q [T,Q,D], k [T,C,D], v [T,C,Dv], sinks [Q] -> [T,Q,Dv]; see moec::cached_attention."""
    keys, values = batch.append(k_cache, k), batch.append(v_cache, v)
    scores = _scores(batch, q, keys) * scale  # [B, Q, S, L]
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    extra = None if sinks is None else sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
    return _mix(batch, _softmax(scores, batch.seen(window, chunk), extra).to(q.dtype), values)


def biased_attention(
    batch: Batch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    sinks: Tensor | None,
    k_cache: CacheName,
    v_cache: CacheName,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    window: int = 0,
) -> Tensor:
    """bias [T,Q,E] for keys 0..E-1 tokens back, sinks [T,Q] -> [T,Q,Dv]; see moec::biased_attention."""
    keys, values = batch.append(k_cache, k), batch.append(v_cache, v)
    scores = _scores(batch, q, keys) * scale
    extent = bias.shape[2]
    back = batch.query_positions[:, :, None] - batch.key_positions[:, None, :]  # [B, S, L]
    at = back.clamp(0, extent - 1)[:, None].expand(*scores.shape)
    added = torch.gather(batch.rows_of(bias).transpose(1, 2), 3, at)  # [B, Q, S, L]
    scores = scores + torch.where((back < extent)[:, None], added, 0.0)
    extra = None if sinks is None else batch.rows_of(sinks).transpose(1, 2)[..., None].float()
    return _mix(batch, _softmax(scores, batch.seen(window, 0), extra).to(q.dtype), values)


def latent_attention(
    batch: Batch,
    q: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_kv_b: Tensor,
    latent_cache: CacheName,
    rope_cache: CacheName,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    nope_dim: int,
) -> Tensor:
    """q [T,Q,nope+R], latent [T,C], k_rope [T,R], w_kv_b [Q*(nope+Dv),C] -> [T,Q,Dv]; see moec::latent_attention."""
    latents, ropes = batch.append(latent_cache, latent), batch.append(rope_cache, k_rope)  # [B, L, C], [B, L, R]
    heads, width = q.shape[1], w_kv_b.shape[1]
    w = w_kv_b.reshape(heads, -1, width)
    w_k, w_v = w[:, :nope_dim], w[:, nope_dim:]
    absorbed = (q[..., :nope_dim].transpose(0, 1) @ w_k).transpose(0, 1)  # [T, Q, C]
    scores = _shared(batch, absorbed, latents) + _shared(batch, q[..., nope_dim:], ropes)
    probabilities = _softmax(scores * scale, batch.seen(0, 0), None).to(q.dtype)  # [B, Q, S, L]
    mixed = probabilities.transpose(1, 2).flatten(1, 2) @ latents  # [B, S*Q, C]
    mixed = mixed.reshape(q.shape[0], heads, width).transpose(0, 1)  # [Q, T, C]
    return (mixed @ w_v.transpose(1, 2)).transpose(0, 1)


def _scores(batch: Batch, q: Tensor, keys: Tensor) -> Tensor:
    """q [T,Q,D], keys [B,C,L,D] -> [B,Q,S,L]; heads of a group share their keys without a copy."""
    kv_heads = keys.shape[1]
    grouped = batch.rows_of(q).transpose(1, 2).reshape(batch.rows, kv_heads, -1, q.shape[2])  # [B, C, G*S, D]
    return (grouped @ keys.transpose(2, 3)).reshape(batch.rows, q.shape[1], batch.columns, keys.shape[2])


def _shared(batch: Batch, q: Tensor, keys: Tensor) -> Tensor:
    """q [T,Q,C], one key for all heads [B,L,C] -> [B,Q,S,L]."""
    flat = batch.rows_of(q).flatten(1, 2)  # [B, S*Q, C]
    scores = (flat @ keys.transpose(1, 2)).reshape(batch.rows, batch.columns, q.shape[1], keys.shape[1])
    return scores.transpose(1, 2)


def _softmax(scores: Tensor, seen: Tensor, extra: Tensor | None) -> Tensor:
    """scores [B,Q,S,L], extra [B,Q,S,1]: one more score without a value -> f32 [B,Q,S,L]."""
    scores = torch.where(seen, scores.float(), torch.finfo(torch.float32).min)
    if extra is None:
        return scores.softmax(-1)
    length = scores.shape[-1]
    return torch.cat([scores, extra], -1).softmax(-1).narrow(-1, 0, length)


def _mix(batch: Batch, probabilities: Tensor, values: Tensor) -> Tensor:
    """[B,Q,S,L], values [B,C,L,Dv] -> [T,Q,Dv]."""
    heads, kv_heads = probabilities.shape[1], values.shape[1]
    grouped = probabilities.reshape(batch.rows, kv_heads, -1, values.shape[2])  # [B, C, G*S, L]
    mixed = (grouped @ values).reshape(batch.rows, heads, batch.columns, values.shape[3])
    return mixed.transpose(1, 2).reshape(-1, heads, values.shape[3])
