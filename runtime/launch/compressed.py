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
    """-> f(batch, x [T,W], gate [T,W], bias [size,W], x_state [N,S,W], gate_state [N,S,W], slots, positions) -> [T,D].

    The weighted mean of each closed window (softmax of gate + bias in float32), zeros for tokens that close none. With
    S = 2*size windows overlap: the first half of the features is that of the window before, and D = W/2.
    """

    def pool(
        batch: Batch, x: Tensor, gate: Tensor, bias: Tensor, x_state: Tensor, gate_state: Tensor, slots: Tensor,
        positions: Tensor,
    ) -> Tensor:  # fmt: skip
        overlap, half = x_state.shape[1] > size, x.shape[1] // 2
        out = x.new_zeros(x.shape[0], half if overlap else x.shape[1])
        for run in batch.runs:
            first = run.position // size  # the first window that may close
            num_closed = run.end // size - first
            if num_closed:
                windows = [
                    _recent(new, state, run, (first - overlap) * size, (first + num_closed) * size).unflatten(
                        0, (-1, size)
                    )
                    for new, state in ((x, x_state), (gate, gate_state))
                ]  # [closed + overlap, size, W]
                values, weights = windows[0], windows[1] + bias
                if overlap:
                    if not first:
                        weights[0] = -math.inf
                    values, weights = (torch.cat([a[:-1, :, :half], a[1:, :, half:]], 1) for a in (values, weights))
                pooled = (values * weights.softmax(1, dtype=torch.float32).to(x.dtype)).sum(1)
                out[run.start + (first + 1) * size - 1 - run.position : run.stop : size] = pooled
            rows = slice(max(run.start, run.stop - x_state.shape[1]), run.stop)
            x_state[run.slot, positions[rows] % x_state.shape[1]] = x[rows]
            gate_state[run.slot, positions[rows] % x_state.shape[1]] = gate[rows]
        return out

    return pool


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
