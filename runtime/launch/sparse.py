"""Sparse attention by library calls: the index scores of each sequence, and attention over the chosen tokens.

M tokens or blocks are chosen per row (and per group of heads, G), as places in the row's own sequence, -1 for none.
A batch of decode rows gathers what it attends; a prefill masks, which costs as much as attention over everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.runtime.batch import Batch, Run, visible

Function = Callable[..., Tensor]


def index_topk(scale: float, count: int, size: int = 1) -> Function:
    """-> f(batch, q [T,I,X], k [T,X], weights f32[T,I], k_cache [N,L,X], slots, positions) -> i32[T,count].

    size > 1: numbers of windows of so many tokens, whose last token's k is the window's.
    Scores are sum over heads of weight * relu(q . k * scale) in float32; ties go as in torch.topk over a sequence.
    """

    def choose(
        batch: Batch, q: Tensor, k: Tensor, weights: Tensor, k_cache: Tensor, slots: Tensor, positions: Tensor
    ) -> Tensor:
        write_entries(k_cache, k, slots, positions, size)
        chosen = torch.empty((q.shape[0], count), dtype=torch.int32)
        for run in batch.runs:
            rows = slice(run.start, run.stop)
            closed = run.end // size
            keys = k_cache[run.slot, :closed].float()
            scores = torch.matmul(q[rows].float(), keys.t()).mul_(scale).relu_()  # [t, I, n]
            total = torch.matmul(weights[rows].unsqueeze(1), scores).squeeze(1)
            hidden = torch.arange(closed) >= (torch.arange(run.position, run.end)[:, None] + 1) // size
            chosen[rows] = _best_places(total.masked_fill_(hidden, -math.inf), count)
        return chosen

    return choose


def index_blocks(block_size: int, count: int, num_local: int) -> Function:
    """-> f(batch, q [T,I,X], k [T,X], k_cache [N,L,X], slots, positions) -> i32[T,I,count], numbers of blocks.

    A block's score is the greatest q . k of its visible keys in float32; the num_local blocks up to the row's own win.
    """

    def choose(batch: Batch, q: Tensor, k: Tensor, k_cache: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        k_cache[slots, positions] = k
        chosen = torch.empty((q.shape[0], q.shape[1], count), dtype=torch.int32)
        for run in batch.runs:
            rows = slice(run.start, run.stop)
            scores = torch.matmul(q[rows].float().transpose(0, 1), k_cache[run.slot, : run.end].float().t())
            scores.masked_fill_(~seen(run), -math.inf)  # [I, t, n]
            scores = F.pad(scores, (0, -run.end % block_size), value=-math.inf)
            best = scores.unflatten(-1, (-1, block_size)).amax(-1)
            if num_local:
                local = torch.arange(run.position, run.end)[:, None] // block_size - torch.arange(num_local)
                best.scatter_(-1, local.clamp(min=0).expand(best.shape[0], -1, -1), math.inf)
            chosen[rows] = _best_places(best, count).transpose(0, 1)
        return chosen

    return choose


def write_entries(cache: Tensor, entries: Tensor, slots: Tensor, positions: Tensor, size: int) -> None:
    """cache [N,L,..], entries [T,..]: those of tokens that close a window of `size` are written at its number."""
    if size == 1:
        cache[slots, positions] = entries
        return
    closing = ((positions + 1) % size == 0).nonzero()[:, 0]
    cache[slots[closing], positions[closing] // size] = entries[closing]


def _best_places(scores: Tensor, count: int) -> Tensor:
    """scores [.., n] -> i32[.., count]: places of the greatest, best first, -1 where only -inf is left."""
    values, places = scores.topk(min(count, scores.shape[-1]), dim=-1)
    places = places.masked_fill_(values == -math.inf, -1).to(torch.int32)
    return F.pad(places, (0, count - places.shape[-1]), value=-1)


def seen(run: Run, window: int = 0, device: torch.device | None = None) -> Tensor:
    """bool[t, end]: which of a sequence's tokens each of its rows sees. device: where it is made, None: the CPU."""
    return visible(torch.arange(run.position, run.end, device=device), 0, run.end, window, 0)


def marked(chosen: Tensor, length: int, block_size: int = 1) -> Tensor:
    """chosen int[.., M] -> bool[.., length]: the tokens of the chosen blocks."""
    num_blocks = -(-length // block_size)
    marks = torch.zeros((*chosen.shape[:-1], num_blocks + 1), dtype=torch.bool)
    marks.scatter_(-1, chosen.long().masked_fill_(chosen < 0, num_blocks), True)
    marks = marks[..., :num_blocks]
    return marks.repeat_interleave(block_size, -1)[..., :length] if block_size > 1 else marks


def softmax_with_sinks(scores: Tensor, keep: Tensor, sinks: Tensor | None) -> Tensor:
    """scores [..,Q,t,n], keep bool that broadcasts, sinks [Q] -> f32[..,Q,t,n]; a sink's share is left out."""
    scores = scores.float().masked_fill(~keep, -math.inf)
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def sparse_attention(scale: float, block_size: int = 1) -> Function:
    """-> f(batch, q [T,Q,D], k [T,C,D], v [T,C,Dv], chosen int[T,G,M], k_cache [N,L,C,D], v_cache, slots, positions,
    sinks?) -> [T,Q,Dv]; query head h takes choice h // (Q/G). Writes k and v to the caches first.
    """

    def attend(
        batch: Batch, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
        positions: Tensor, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        k_cache[slots, positions] = k
        v_cache[slots, positions] = v
        heads, shared = q.shape[1], q.shape[1] // k.shape[1]
        out = q.new_empty(q.shape[0], heads, v.shape[2])
        for run in batch.runs:
            rows = slice(run.start, run.stop)
            keep = marked(chosen[rows], run.end, block_size) & seen(run)[:, None]  # [t, G, n]
            used = keep.any(0).any(0).nonzero()[:, 0]  # the only keys that any row of this sequence reads
            keep = keep[..., used].transpose(0, 1).repeat_interleave(heads // chosen.shape[1], 0)  # [Q, t, m]
            keys = k_cache[run.slot, used].transpose(0, 1).repeat_interleave(shared, 0)  # [Q, m, D]
            values = v_cache[run.slot, used].transpose(0, 1).repeat_interleave(shared, 0)
            scores = torch.matmul(q[rows].transpose(0, 1), keys.transpose(1, 2)) * scale
            out[rows] = torch.matmul(softmax_with_sinks(scores, keep, sinks).to(q.dtype), values).transpose(0, 1)
        return out

    return attend
