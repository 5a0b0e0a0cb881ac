"""DeepSeek-V4's attention in moec ops (see own_methods.py): over the last tokens, and over compressed windows of all.

The library's compressors keep what has not filled a window yet in their cache's layers, and append to it; here a state
holds the last rows, and every token gives the entry of the window that it closes. T tokens, Q heads of width D, X the
width of index keys. Source: DeepSeek-V4, section 2.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import moec.passes.ir.compressed_ops  # noqa: F401  (registers torch.ops.moec)
from moec.compiler.capture.attend import Asked, Entries, attend
from moec.compiler.capture.context import Kept
from moec.compiler.capture.own_indexers import INDEX_KEYS, context_of, rotate

moec_ops = torch.ops.moec


def attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: dict[str, tuple[Tensor, Tensor]],
    position_ids: Tensor,
    attention_mask: Any,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """hidden_states [1, T, H] -> the same. One head of keys, which are the values too; so the output is turned back."""
    shape, layer = (*hidden_states.shape[:2], -1, module.head_dim), module.layer_idx
    cos, sin = position_embeddings[module.rope_layer_type]
    turn, context = rotate(module), context_of(layer)
    q_residual = module.q_a_norm(module.q_a_proj(hidden_states))
    q = turn(module.q_b_norm(module.q_b_proj(q_residual).view(shape)), cos, sin, unsqueeze_dim=2)  # [1, T, Q, D]
    kv = turn(module.kv_norm(module.kv_proj(hidden_states)).view(shape), cos, sin, unsqueeze_dim=2).transpose(1, 2)
    entries = None
    if module.compressor is not None:
        chosen = None
        if hasattr(module.compressor, "indexer"):
            chosen = _choose(module.compressor.indexer, hidden_states, q_residual, position_ids, layer)
        new = _compress(module.compressor, hidden_states, layer, "entry")
        entries = Entries(new, chosen, module.compressor.compress_rate)
    asked = Asked(
        layer=layer,
        query=q.transpose(1, 2),
        key=kv,
        value=kv,
        updated=(kv, kv),
        w_kv_b=None,
        mask=attention_mask,
        scale=float(module.scaling),
        softcap=0.0,
        sinks=module.sinks,
        entries=entries,
    )
    y = attend(context, asked)
    y = q if y is None else turn(y.unsqueeze(0), cos, -sin, unsqueeze_dim=2)
    grouped = y.reshape(*shape[:2], module.config.o_groups, -1)
    return module.o_b_proj(_grouped_linear(module.o_a_proj, grouped[0])[None]), None


def _grouped_linear(linear: Any, x: Tensor) -> Tensor:
    """x [T, G, D] -> [T, G*R], each group by its own rows of the weight [G*R, D]."""
    w = linear.weight.view(linear.n_groups, -1, x.shape[-1])  # [G, R, D]
    return torch.cat([F.linear(x[:, g], w[g]) for g in range(linear.n_groups)], 1)


def _compress(compressor: Any, hidden: Tensor, layer: int, role: str) -> Tensor:
    """hidden [1, T, H] -> the entry [T, D] of the window that each token closes; of other tokens, anything finite.

    The entry is rotated to the place of its window's first token.
    """
    context, size = context_of(layer), compressor.compress_rate
    x, gate = compressor.kv_proj(hidden)[0], compressor.gate_proj(hidden)[0]  # [T, W]
    rows = size * (2 if x.shape[1] == 2 * compressor.head_dim else 1)
    states = [
        context.keep(layer, f"{role}_{name}", Kept((rows, x.shape[1]), "state", t.dtype))
        for name, t in (("values", x), ("gates", gate))
    ]
    if states[0] is None:
        pooled = x[:, : compressor.head_dim]
    else:
        pooled = moec_ops.pool_windows(
            x, gate, compressor.position_bias, *states, context.slots, context.positions, size
        )
    entries = compressor.kv_norm(pooled)[None]  # [1, T, D]
    first = (context.positions - (size - 1))[None]
    cos, sin = compressor.rotary_emb(entries, position_ids=first, layer_type=compressor.rope_layer_type)
    return rotate(compressor)(entries.unsqueeze(1), cos, sin)[0, 0]


def _choose(indexer: Any, hidden: Tensor, q_residual: Tensor, position_ids: Tensor, layer: int) -> Tensor:
    """hidden [1, T, H] -> i32[T, M], the closed windows with the best index scores."""
    keys, context = _compress(indexer, hidden, layer, "index"), context_of(layer)
    cache = context.keep(layer, INDEX_KEYS, Kept((indexer.head_dim,), dtype=keys.dtype))
    cos, sin = indexer.rotary_emb(hidden, position_ids=position_ids, layer_type=indexer.rope_layer_type)
    q = indexer.q_b_proj(q_residual).view(*hidden.shape[:2], -1, indexer.head_dim)
    q = rotate(indexer)(q, cos, sin, unsqueeze_dim=2)[0]  # [T, I, X]
    if cache is None:
        return q.new_zeros(q.shape[0], indexer.index_topk, dtype=torch.int32)
    weights = indexer.scorer.weights_proj(hidden)[0].float() * indexer.scorer.weights_scaling  # [T, I]
    places, end = (context.slots, context.positions), (indexer.index_topk, indexer.compress_rate)
    return moec_ops.index_topk(q, keys, weights, cache, *places, indexer.scorer.softmax_scale, *end)
