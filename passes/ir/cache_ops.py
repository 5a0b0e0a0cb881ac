"""Attention over a cache that stores keys and values as int8, with one scale for each token and head."""

from __future__ import annotations

import torch
from torch import Tensor

from moec.passes.ir.ops import cached_attention

LARGEST = 127.0


def to_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., D] -> codes i8[.., D], scales f32[..]; x is about codes * scales, to half a scale.

    scale = max |x| / 127, codes = x * (127 / max |x|) rounded to nearest even; a row of zeros has scale 0. NaN and
    infinity become NaN: the row's scale, or 0 times it, tells.
    """
    wide = x.float()
    largest = wide.abs().amax(-1)
    # a quotient of two tensors: torch makes of 127 / x the reciprocal of x, times 127, which rounds twice
    inverse = torch.where(largest > 0, torch.full_like(largest, LARGEST) / largest, 0.0)
    codes = (wide * inverse.unsqueeze(-1)).round().nan_to_num(0.0, 0.0, 0.0)
    return codes.to(torch.int8), largest / LARGEST


@torch.library.custom_op("moec::cached_attention_int8", mutates_args=("k_cache", "v_cache", "k_scales", "v_scales"))
def cached_attention_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    slots: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """moec::cached_attention over what to_codes keeps: k_cache i8[N,L,C,D], v_cache i8[N,L,C,Dv], scales f32[N,L,C].

    The new keys and values are read back from the cache as well. All in float32, rounded once to q's dtype.
    """
    for new, cache, scales in ((k, k_cache, k_scales), (v, v_cache, v_scales)):
        cache[slots, positions], scales[slots, positions] = to_codes(new)
    n = int(positions.max()) + 1 if positions.numel() else 0
    used = slots.unique()
    places = torch.searchsorted(used, slots)
    keys = k_cache[used, :n].float() * k_scales[used, :n].unsqueeze(-1)
    values = v_cache[used, :n].float() * v_scales[used, :n].unsqueeze(-1)
    latest = keys[places, positions], values[places, positions]
    wide = None if sinks is None else sinks.float()
    y = cached_attention(q.float(), *latest, keys, values, places, positions, wide, scale, window, chunk, softcap)
    return y.to(q.dtype)


@cached_attention_int8.register_fake
def _(q, k, v, k_cache, v_cache, k_scales, v_scales, slots, positions, sinks, scale, window=0, chunk=0, softcap=0.0):
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])
