"""The moec ops of sparse attention: which earlier tokens each token attends, and attention over those alone.

Letters as in ops.py, and: I index heads, X index head width, M tokens or blocks that are chosen, G groups of query
heads with a choice each. A choice holds places in the token's own sequence, best first, -1 where fewer are visible.
Ties go as in torch.topk over the scores of all of the sequence's tokens so far, -inf at those that are not visible:
that is what the models do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moec.passes.ir.sequences import sequences, visible


def write_entries(cache: Tensor, entries: Tensor, slots: Tensor, positions: Tensor, size: int) -> None:
    """cache [N,L,..], entries [T,..]: those of tokens that close a window of `size` are written at its number."""
    closing = (positions + 1) % size == 0
    cache[slots[closing], positions[closing] // size] = entries[closing]


def best_places(scores: Tensor, count: int) -> Tensor:
    """scores [.., n], -inf at what must not be chosen -> i32[.., count]: places, best first; -1: none."""
    values, places = scores.topk(min(count, scores.shape[-1]), dim=-1)
    places = places.masked_fill(values == -math.inf, -1).to(torch.int32)
    return torch.nn.functional.pad(places, (0, count - places.shape[-1]), value=-1)


@torch.library.custom_op("moec::index_topk", mutates_args=("k_cache",))
def index_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    count: int,
    size: int = 1,
) -> Tensor:
    """The tokens with the highest index scores, sum over heads of weight * relu(q . k * scale), in float32.

    q [T,I,X], k [T,X] (written to k_cache [N,L,X] first), weights f32[T,I], slots and positions i64[T] -> i32[T,count].
    size > 1: windows of so many tokens are chosen by number, and the k of a window's last token is that of the window.
    Source: DeepSeek-V3.2-Exp, section 2.1 (lightning indexer).
    """
    write_entries(k_cache, k, slots, positions, size)
    chosen = q.new_empty(q.shape[0], count, dtype=torch.int32)
    for s, rows, p, n in sequences(slots, positions):
        keys = k_cache[s, : n // size].float()
        scores = torch.relu(torch.matmul(q[rows].float(), keys.t()) * scale)  # [t, I, n]
        total = torch.matmul(weights[rows].unsqueeze(1), scores).squeeze(1)  # [t, n]
        hidden = torch.arange(n // size, device=q.device) >= ((p + 1) // size)[:, None]
        chosen[rows] = best_places(total.masked_fill(hidden, -math.inf), count)
    return chosen


@index_topk.register_fake
def _(q, k, weights, k_cache, slots, positions, scale, count, size=1):
    return q.new_empty((q.shape[0], count), dtype=torch.int32)


@torch.library.custom_op("moec::index_blocks", mutates_args=("k_cache",))
def index_blocks(
    q: Tensor,
    k: Tensor,
    k_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    block_size: int,
    count: int,
    num_local: int,
) -> Tensor:
    """The blocks of keys with the highest index score of one of their keys, q . k in float32, for each index head.

    q [T,I,X], k [T,X] (written to k_cache [N,L,X] first), slots and positions i64[T] -> i32[T,I,count]. Block b holds
    the places b*block_size and on; the token's own block and those just before it, num_local in all, always win.
    Source: MiniMax-M3, transformers' MiniMaxM3VLIndexer.
    """
    k_cache[slots, positions] = k
    chosen = q.new_empty(q.shape[0], q.shape[1], count, dtype=torch.int32)
    for s, rows, p, n in sequences(slots, positions):
        scores = torch.matmul(q[rows].float().transpose(0, 1), k_cache[s, :n].float().t())  # [I, t, n]
        scores = scores.masked_fill(~visible(p, n), -math.inf)
        chosen[rows] = best_places(block_scores(scores, p, block_size, num_local), count).transpose(0, 1)
    return chosen


def block_scores(scores: Tensor, positions: Tensor, block_size: int, num_local: int) -> Tensor:
    """scores [I,t,n] of keys, positions [t] -> [I,t,blocks]: the greatest of each block, +inf for the local ones."""
    scores = torch.nn.functional.pad(scores, (0, -scores.shape[-1] % block_size), value=-math.inf)
    best = scores.unflatten(-1, (-1, block_size)).amax(-1)
    if not num_local:
        return best
    local = positions[:, None] // block_size - torch.arange(num_local, device=positions.device)  # [t, num_local]
    return best.scatter(-1, local.clamp(min=0).expand(best.shape[0], -1, -1), math.inf)


@index_blocks.register_fake
def _(q, k, k_cache, slots, positions, block_size, count, num_local):
    return q.new_empty((q.shape[0], q.shape[1], count), dtype=torch.int32)


def chosen_places(chosen: Tensor, length: int, block_size: int = 1) -> Tensor:
    """chosen int[.., M] places of blocks, -1 for none -> bool[.., length]: the tokens in them."""
    num_blocks = -(-length // block_size)
    index = chosen.long().masked_fill(chosen < 0, num_blocks)
    kept = torch.zeros((*chosen.shape[:-1], num_blocks + 1), dtype=torch.bool, device=chosen.device)
    kept = kept.scatter(-1, index, True)[..., :num_blocks]
    return kept.repeat_interleave(block_size, -1)[..., :length] if block_size > 1 else kept


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """scores [Q,t,n], sinks [Q] -> softmax over the keys and the sink, f32[Q,t,n], without the sink's share."""
    scores = scores.float()
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


@torch.library.custom_op("moec::sparse_attention", mutates_args=("k_cache", "v_cache"))
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    block_size: int = 1,
) -> Tensor:
    """moec::cached_attention over the chosen blocks of tokens alone.

    q [T,Q,D], k [T,C,D], v [T,C,Dv], chosen int[T,G,M] (query head h takes choice h // (Q/G)), caches [N,L,C,D] and
    [N,L,C,Dv], slots and positions i64[T], sinks [Q] -> [T,Q,Dv]. Scores and softmax in float32.
    """
    k_cache[slots, positions] = k
    v_cache[slots, positions] = v
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    for s, rows, p, n in sequences(slots, positions):
        keys = k_cache[s, :n].repeat_interleave(q.shape[1] // k.shape[1], 1)
        values = v_cache[s, :n].repeat_interleave(q.shape[1] // k.shape[1], 1)
        keep = chosen_places(chosen[rows], n, block_size) & visible(p, n)[:, None]  # [t, G, n]
        keep = keep.transpose(0, 1).repeat_interleave(q.shape[1] // chosen.shape[1], 0)  # [Q, t, n]
        scores = torch.einsum("qhd,khd->hqk", q[rows], keys) * scale
        a = softmax_with_sinks(scores.masked_fill(~keep, -math.inf), sinks).to(q.dtype)
        out[rows] = torch.einsum("hqk,khd->qhd", a, values)
    return out


@sparse_attention.register_fake
def _(q, k, v, chosen, k_cache, v_cache, slots, positions, sinks, scale, block_size=1):
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


@torch.library.custom_op("moec::sparse_latent_attention", mutates_args=("latent_cache", "rope_cache"))
def sparse_latent_attention(
    q: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_kv_b: Tensor,
    chosen: Tensor | None,
    latent_cache: Tensor,
    rope_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    nope_dim: int,
    window: int = 0,
) -> Tensor:
    """moec::latent_attention over the chosen tokens alone, with a window and sinks.

    q [T,Q,nope+R], latent [T,C], k_rope [T,R] (rotated), w_kv_b [Q*(nope+Dv),C], chosen int[T,M] (None: all that are
    visible), caches [N,L,C] and [N,L,R], slots and positions i64[T], sinks [Q] -> [T,Q,Dv]. window: 0 means none.
    """
    latent_cache[slots, positions] = latent
    rope_cache[slots, positions] = k_rope
    w = w_kv_b.view(q.shape[1], -1, latent.shape[1])
    w_k, w_v = w[:, :nope_dim], w[:, nope_dim:]
    out = q.new_empty(q.shape[0], q.shape[1], w_v.shape[1])
    absorbed = torch.einsum("qhd,hdc->qhc", q[..., :nope_dim], w_k)
    for s, rows, p, n in sequences(slots, positions):
        scores = torch.einsum("qhc,kc->hqk", absorbed[rows], latent_cache[s, :n])
        scores = (scores + torch.einsum("qhr,kr->hqk", q[rows][..., nope_dim:], rope_cache[s, :n])) * scale
        keep = visible(p, n, window)
        if chosen is not None:
            keep = keep & chosen_places(chosen[rows], n)
        a = softmax_with_sinks(scores.masked_fill(~keep, -math.inf), sinks).to(q.dtype)
        out[rows] = torch.einsum("hqk,kc,hdc->qhd", a, latent_cache[s, :n], w_v)
    return out


@sparse_latent_attention.register_fake
def _(q, latent, k_rope, w_kv_b, chosen, latent_cache, rope_cache, slots, positions, sinks, scale, nope_dim, window=0):
    return q.new_empty(q.shape[0], q.shape[1], w_kv_b.shape[0] // q.shape[1] - nope_dim)
