"""Multi-head latent attention by library calls: the cache holds one latent and one rotated key for all heads.

The up-projection of the latents is absorbed into the query and into the result, so that the cached latents are used as
they are. Source: DeepSeek-V2, section 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.runtime.batch import Batch, Run, first_visible
from moec.runtime.launch.attention import rows_of
from moec.runtime.launch.sparse import Function, marked, seen, softmax_with_sinks


def latent_attention(scale: float, nope_dim: int) -> Function:
    """-> f(batch, q [T,Q,nope+R], latent [T,C], k_rope [T,R], w_kv_b [Q*(nope+Dv),C], caches [N,L,C], [N,L,R], slots,
    positions) -> [T,Q,Dv]. Writes latent and k_rope to the caches first.
    """
    attend = sparse_latent_attention(scale, nope_dim)

    def attend_all(batch: Batch, q: Tensor, latent: Tensor, k_rope: Tensor, w_kv_b: Tensor, *places: Tensor) -> Tensor:
        return attend(batch, q, latent, k_rope, w_kv_b, None, *places)

    return attend_all


def sparse_latent_attention(scale: float, nope_dim: int, window: int = 0) -> Function:
    """-> f(batch, q, latent, k_rope, w_kv_b, chosen int[T,M]?, caches, slots, positions, sinks [Q]?) -> [T,Q,Dv].

    As latent_attention, over the chosen tokens. chosen None: all that are visible. window: 0 means none.
    """

    def attend(
        batch: Batch, q: Tensor, latent: Tensor, k_rope: Tensor, w_kv_b: Tensor, chosen: Tensor | None,
        latent_cache: Tensor, rope_cache: Tensor, slots: Tensor, positions: Tensor, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        latent_cache[slots, positions] = latent
        rope_cache[slots, positions] = k_rope
        w = w_kv_b.view(q.shape[1], -1, latent.shape[1])
        w_k, w_v = w[:, :nope_dim], w[:, nope_dim:]
        absorbed = torch.bmm(q[..., :nope_dim].transpose(0, 1), w_k)  # [Q, T, C]
        q_rope = q[..., nope_dim:].transpose(0, 1)  # [Q, T, R]
        if batch.is_decode:
            latents, ropes, keep = _of_decode(batch, chosen, latent_cache, rope_cache, slots, positions, window)
            scores = torch.matmul(absorbed.transpose(0, 1), latents.transpose(1, 2))  # [T, Q, M]
            scores = (scores + torch.matmul(q_rope.transpose(0, 1), ropes.transpose(1, 2))) * scale
            weights = softmax_with_sinks(scores.unsqueeze(2), keep, sinks).squeeze(2).to(q.dtype)
            mixed = torch.matmul(weights, latents).transpose(0, 1)  # [Q, T, C]
        else:
            mixed = absorbed.new_empty(absorbed.shape)
            for run in batch.runs:
                rows, first = slice(run.start, run.stop), first_visible(run.position, window, 0)
                latents, ropes = latent_cache[run.slot, first : run.end], rope_cache[run.slot, first : run.end]
                scores = torch.matmul(absorbed[:, rows], latents.t())  # [Q, t, n]
                scores = (scores + torch.matmul(q_rope[:, rows], ropes.t())) * scale
                weights = softmax_with_sinks(scores, _of_run(run, chosen, window, q.device)[:, first:], sinks)
                mixed[:, rows] = torch.matmul(weights.to(q.dtype), latents)
        return torch.bmm(mixed, w_v.transpose(1, 2)).transpose(0, 1).contiguous()

    return attend


def _of_decode(
    batch: Batch, chosen: Tensor | None, latent_cache: Tensor, rope_cache: Tensor, slots: Tensor, positions: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What each row of a decode batch may attend: latents [T, M, C], rotated keys [T, M, R], keep bool[T, 1, 1, M]."""
    if chosen is None:
        first, end, keep = batch.decode_mask(window, 0)
        return rows_of(latent_cache, batch, slots, first, end), rows_of(rope_cache, batch, slots, first, end), keep
    places = chosen.long().clamp(min=0)  # [T, M]
    keep = chosen >= 0
    if window:
        keep = keep & (places > positions[:, None] - window)
    return latent_cache[slots[:, None], places], rope_cache[slots[:, None], places], keep[:, None, None]


def _of_run(run: Run, chosen: Tensor | None, window: int, device: torch.device) -> Tensor:
    """bool[t, end]: which tokens of its sequence each row of a run attends."""
    keep = seen(run, window, device)
    return keep if chosen is None else keep & marked(chosen[run.start : run.stop], run.end)
