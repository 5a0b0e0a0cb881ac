"""The moec ops of attention over compressed tokens: one entry for each closed window of a sequence's tokens.

Window w of a sequence holds its tokens at places w*size .. (w+1)*size-1 and closes with the last of them. Entries lie
in a cache by window: of a length L, the first L // size places are used. W is the width of what is pooled, S the rows
of a state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moec.passes.ir.sequences import sequences, visible
from moec.passes.ir.sparse_ops import chosen_places, softmax_with_sinks, write_entries


def window_rows(x: Tensor, state: Tensor, positions: Tensor) -> Tensor:
    """The rows before the new ones and the new ones: x [t,W] at consecutive positions, state [S,W] -> [S+t, W].

    Row S+i is x[i]. The state holds place p at p % S; rows before the sequence's start are zero.
    """
    places = positions[:1] + torch.arange(-state.shape[0], 0, device=x.device)
    return torch.cat([state[places % state.shape[0]].masked_fill((places < 0)[:, None], 0), x])


@torch.library.custom_op("moec::pool_windows", mutates_args=("x_state", "gate_state"))
def pool_windows(
    x: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    x_state: Tensor,
    gate_state: Tensor | None,
    slots: Tensor,
    positions: Tensor,
    size: int,
) -> Tensor:
    """Each closed window's weighted mean, weights softmax over the window of gate + bias, for every feature by itself.

    x and gate [T,W], bias [size,W], states [N,S,W] -> [T,D], zeros for tokens that close no window. S = size: D = W.
    S = 2*size: windows overlap and D = W/2; an entry pools the first half of the features of the window before and the
    second half of its own. Softmax in float32, rounded to x.dtype. Without gate, bias and its state: the plain mean, in
    float32, of windows that do not overlap.
    Source: DeepSeek-V4, section 2.3 (compressed sparse and heavily compressed attention).
    """
    overlap = x_state.shape[1] > size
    half = x.shape[1] // 2
    out = x.new_zeros(x.shape[0], half if overlap else x.shape[1])
    for s, rows, p, _ in sequences(slots, positions):
        xs = window_rows(x[rows], x_state[s], p)
        gates = None if gate is None else window_rows(gate[rows], gate_state[s], p)
        for i in ((p + 1) % size == 0).nonzero()[:, 0].tolist():
            end = x_state.shape[1] + i + 1
            window = xs[end - size : end]  # [size, W]
            if gates is None:
                out[rows[i]] = window.float().mean(0).to(x.dtype)
                continue
            weights = gates[end - size : end] + bias
            if overlap:
                before, gate_before = xs[end - 2 * size : end - size], gates[end - 2 * size : end - size] + bias
                if int(p[i]) < size:
                    gate_before = torch.full_like(gate_before, -math.inf)
                window = torch.cat([before[:, :half], window[:, half:]])
                weights = torch.cat([gate_before[:, :half], weights[:, half:]])
            out[rows[i]] = (window * weights.softmax(0, dtype=torch.float32).to(x.dtype)).sum(0)
        last = rows[-x_state.shape[1] :]
        x_state[s, positions[last] % x_state.shape[1]] = x[last]
        if gate is not None:
            gate_state[s, positions[last] % x_state.shape[1]] = gate[last]
    return out


@pool_windows.register_fake
def _(x, gate, bias, x_state, gate_state, slots, positions, size):
    return x.new_empty(x.shape[0], x.shape[1] // 2 if x_state.shape[1] > size else x.shape[1])


@torch.library.custom_op("moec::compressed_attention", mutates_args=("kv_cache", "entry_cache"))
def compressed_attention(
    q: Tensor,
    kv: Tensor,
    entries: Tensor,
    chosen: Tensor | None,
    kv_cache: Tensor,
    entry_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    size: int,
) -> Tensor:
    """Attention over the last tokens and the entries of closed windows; one head of keys, which are the values too.

    q [T,Q,D], kv [T,D] (written to kv_cache [N,L,D]), entries [T,D] (those that close a window of `size` tokens are
    written to entry_cache [N,L,D]), chosen i32[T,M]: numbers of windows, -1 for none (None: all that are closed),
    sinks [Q] -> [T,Q,D]. window: how far tokens see each other, 0 for no limit. Scores and softmax in float32.
    """
    kv_cache[slots, positions] = kv
    write_entries(entry_cache, entries, slots, positions, size)
    out = q.new_empty(q.shape)
    for s, rows, p, n in sequences(slots, positions):
        keys = torch.cat([kv_cache[s, :n], entry_cache[s, : n // size]])
        closed = torch.arange(n // size, device=q.device) < ((p + 1) // size)[:, None]
        if chosen is not None:
            closed = closed & chosen_places(chosen[rows], n // size)
        keep = torch.cat([visible(p, n, window), closed], 1)
        scores = torch.einsum("qhd,kd->hqk", q[rows], keys) * scale
        a = softmax_with_sinks(scores.masked_fill(~keep, -math.inf), sinks).to(q.dtype)
        out[rows] = torch.einsum("hqk,kd->qhd", a, keys)
    return out


@compressed_attention.register_fake
def _(q, kv, entries, chosen, kv_cache, entry_cache, slots, positions, sinks, scale, window, size):
    return q.new_empty(q.shape)
