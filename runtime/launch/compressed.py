"""Attention over compressed tokens by library calls: pooling of windows, and one softmax over tokens and windows.

Window w of a sequence holds its tokens at places w*size .. (w+1)*size-1; the last of them closes it. A state of S rows
holds the sequence's last rows, that of place p at p % S.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moec.runtime.batch import Batch, Run, first_visible
from moec.runtime.launch.sparse import marked, seen, softmax_with_sinks, write_entries

Function = Callable[..., Tensor]


def pool_windows(size: int) -> Function:
    """-> f(batch, x [T,W], gate [T,W]?, bias [size,W]?, x_state [N,S,W], gate_state?, slots, positions) -> [T,D].

    The weighted mean of each closed window (softmax of gate + bias in float32; the plain mean without them), zeros for
    tokens that close none. With S = 2*size windows overlap: the first half of the features is that of the window
    before, and D = W/2.
    """

    def pool(
        batch: Batch, x: Tensor, gate: Tensor | None, bias: Tensor | None, x_state: Tensor, gate_state: Tensor | None,
        slots: Tensor, positions: Tensor,
    ) -> Tensor:  # fmt: skip
        overlap = x_state.shape[1] > size
        pairs = [(x, x_state)]
        if gate is not None and gate_state is not None:
            pairs.append((gate, gate_state))
        out = x.new_zeros(x.shape[0], x.shape[1] // 2 if overlap else x.shape[1])
        for run in batch.runs:
            first = run.position // size  # the first window that may close
            end = run.end // size
            if end > first:
                ends = [_recent(new, state, run, (first - overlap) * size, end * size) for new, state in pairs]
                pooled = _pooled([rows.unflatten(0, (-1, size)) for rows in ends], bias, overlap, first)
                out[run.start + (first + 1) * size - 1 - run.position : run.stop : size] = pooled
            last = slice(max(run.start, run.stop - x_state.shape[1]), run.stop)
            for new, state in pairs:
                state[run.slot, positions[last] % state.shape[1]] = new[last]
        return out

    return pool


def _pooled(windows: list[Tensor], bias: Tensor | None, overlap: bool, first: int) -> Tensor:
    """windows: values and, where there are some, weights [closed + overlap, size, W] -> [closed, D]."""
    values = windows[0]
    if bias is None:
        return values.float().mean(1).to(values.dtype)
    weights = windows[1] + bias
    if overlap:
        half = values.shape[2] // 2
        if not first:
            weights[0] = -math.inf
        values, weights = (torch.cat([a[:-1, :, :half], a[1:, :, half:]], 1) for a in (values, weights))
    return (values * weights.softmax(1, dtype=torch.float32).to(values.dtype)).sum(1)


def _recent(new: Tensor, state: Tensor, run: Run, start: int, stop: int) -> Tensor:
    """Rows of a sequence at places start..stop, from its state before place run.position; zeros before its start."""
    places = torch.arange(start, run.position)
    old = state[run.slot, places % state.shape[1]].masked_fill_((places < 0)[:, None], 0)
    return torch.cat([old, new[run.start : run.start + stop - run.position]])


def compressed_attention(scale: float, window: int, size: int) -> Function:
    """-> f(batch, q [T,Q,D], kv [T,D], entries [T,D], chosen i32[T,M]?, kv_cache [N,L,D], entry_cache [N,L,D], slots,
    positions, sinks [Q]?) -> [T,Q,D]: attention over the last tokens and over the chosen (None: all) closed windows.
    """

    def attend(
        batch: Batch, q: Tensor, kv: Tensor, entries: Tensor, chosen: Tensor | None, kv_cache: Tensor,
        entry_cache: Tensor, slots: Tensor, positions: Tensor, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        kv_cache[slots, positions] = kv
        write_entries(entry_cache, entries, slots, positions, size)
        out = q.new_empty(q.shape)
        for run in batch.runs:
            rows, first, closed = slice(run.start, run.stop), first_visible(run.position, window, 0), run.end // size
            keys = torch.cat([kv_cache[run.slot, first : run.end], entry_cache[run.slot, :closed]])
            keep = torch.arange(closed) < (torch.arange(run.position, run.end)[:, None] + 1) // size
            if chosen is not None:
                keep = keep & marked(chosen[rows], closed)
            keep = torch.cat([seen(run, window)[:, first:], keep], 1)
            scores = torch.matmul(q[rows].transpose(0, 1), keys.t()) * scale  # [Q, t, n]
            out[rows] = torch.matmul(softmax_with_sinks(scores, keep, sinks).to(q.dtype), keys).transpose(0, 1)
        return out

    return attend
