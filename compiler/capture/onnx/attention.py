"""ONNX's own attention and rotation (opset 23), as plain tensor operations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moec.compiler.capture.onnx import host
from moec.compiler.errors import UnsupportedModel


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *,
    is_causal: int = 0,
    q_num_heads: int = 0,
    kv_num_heads: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int = 1,
    qk_matmul_output_mode: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B,Q,S,D] (or [B,S,Q*D]), k and v alike with C heads -> the result in q's form, and all keys and values.

    mask: added to the scores, or bool with True where a key is seen. Raises: UnsupportedModel: causal with a past.
    """
    if is_causal and past_key is not None:
        raise UnsupportedModel("is causal and has a past; a mask says the same without doubt")
    host.same_type(q, k, v)
    packed = q.dim() == 3
    if packed:
        q, k, v = (_heads(t, n) for t, n in ((q, q_num_heads), (k, kv_num_heads), (v, kv_num_heads)))
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    repeat = q.shape[1] // k.shape[1]
    keys, values = (t if repeat == 1 else t.repeat_interleave(repeat, 1) for t in (k, v))
    scores = torch.matmul(q, keys.transpose(2, 3)) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if is_causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    y = torch.matmul(scores.float().softmax(-1).to(q.dtype), values)
    return (y.transpose(1, 2).flatten(2) if packed else y), k, v


def _heads(x: Tensor, count: int) -> Tensor:
    """[B, S, count * D] -> [B, count, S, D]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """x [B,Q,S,D] (or [B,S,Q*D]); cos and sin [M,R/2] with positions [B,S], or [B,S,R/2] without."""
    packed = x.dim() == 3
    if packed:
        x = _heads(x, num_heads)
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]  # [B, S, R/2]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    width = rotary_embedding_dim or x.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = a * cos - b * sin, b * cos + a * sin
    y = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    y = torch.cat([y, rest], -1) if rotary_embedding_dim else y
    return y.transpose(1, 2).flatten(2) if packed else y
