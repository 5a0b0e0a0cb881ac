"""Indexers of transformers that work on their cache's layers themselves, in moec ops (see own_methods.py).

T tokens of the ragged batch, I index heads, X the width of index keys.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import moec.passes.ir.compressed_ops
import moec.passes.ir.sparse_ops
import moec.passes.ir.state_ops  # noqa: F401  (all register torch.ops.moec)
from moec.compiler.capture.attend import ChosenBlocks
from moec.compiler.capture.context import Context, Kept
from moec.compiler.errors import UnsupportedModel

moec_ops = torch.ops.moec
INDEX_KEYS = "index_keys"  # the role of what an indexer keeps
HELPER = "_moec_helper"  # where a module finds another one of the model during a trace


def context_of(layer: int) -> Context:
    """The context of the trace that runs. Raises: UnsupportedModel: none does."""
    context = Context.current
    if context is None:
        raise UnsupportedModel(f"layer {layer}: attention ran outside a capture")
    return context


def rotate(module: Any) -> Any:
    """The rotary function of a module's own file."""
    return sys.modules[type(module).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]


def minimax_m3_blocks(
    indexer: Any, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], past_key_values: Any, position_ids: Tensor
) -> ChosenBlocks:
    """hidden [1, T, H] -> the blocks that each token attends, of their own for each head of keys."""
    shape = (*hidden.shape[:2], -1, indexer.head_dim)
    q = indexer.q_norm(indexer.q_proj(hidden).view(shape)).transpose(1, 2)  # [1, I, T, X]
    k = indexer.k_norm(indexer.k_proj(hidden).view(shape)).transpose(1, 2)
    cos, sin = (table[..., : indexer.head_dim] for table in position_embeddings)
    q, k = rotate(indexer)(q, k, cos, sin)
    q, k = q[0].transpose(0, 1), k[0, 0]
    context, size, count = context_of(indexer.layer_idx), indexer.block_size, indexer.topk_blocks
    cache = context.keep(indexer.layer_idx, INDEX_KEYS, Kept((indexer.head_dim,), dtype=k.dtype))
    if cache is None:
        return ChosenBlocks(q.new_zeros(q.shape[0], q.shape[1], count, dtype=torch.int32), size)
    places = context.slots, context.positions
    return ChosenBlocks(moec_ops.index_blocks(q, k, cache, *places, size, count, indexer.local_blocks), size)


def qwen4_blocks(
    indexer: Any, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Any, past_key_values: Any
) -> ChosenBlocks:
    """hidden [1, T, H] -> the closed blocks of keys that each token attends, and behind them its own open block.

    A block's key is the mean of its tokens', rotated to its first token's place. Source: Qwen4's QSA, in transformers.
    """
    size, layer, width = indexer.compress_ratio, indexer.layer_idx, indexer.index_head_dim
    q, k = indexer.index_qk_proj(hidden).split([n * width for n in (indexer.index_n_heads, indexer.index_kv_heads)], -1)
    cos, sin = position_embeddings
    q = indexer.q_layernorm(q.reshape(*hidden.shape[:2], -1, width))
    q = rotate(indexer)(q, cos=cos, sin=sin, unsqueeze_dim=2)[0]  # [T, I, X]
    context, k = context_of(layer), k[0]
    window = context.keep(layer, "index_window", Kept((size, width), "state", k.dtype))
    cache = context.keep(layer, INDEX_KEYS, Kept((width,), dtype=k.dtype))
    if window is None or cache is None:
        return ChosenBlocks(q.new_zeros(q.shape[0], 1, indexer.block_topk + 1, dtype=torch.int32), size)
    positions, places = context.positions, (context.slots, context.positions)
    k = indexer.k_layernorm(moec_ops.pool_windows(k, None, None, window, None, *places, size))
    cos, sin = getattr(indexer, HELPER)(hidden, (positions - (size - 1))[None, None])
    k = rotate(indexer)(k.unsqueeze(1), cos=cos[0], sin=sin[0])[:, 0]
    weights = q.new_ones(q.shape[:2], dtype=torch.float32)
    chosen = moec_ops.index_topk(q, k, weights, cache, *places, width**-0.5, indexer.block_topk, size)
    own = torch.where((positions + 1) % size == 0, -1, positions // size).to(torch.int32)
    return ChosenBlocks(torch.cat([chosen, own[:, None]], 1).unsqueeze(1), size)


def qwen4_ngrams(module: Any, input_ids: Tensor, past_key_values: Any) -> Tensor:
    """input_ids [1, T] or [T, 1] -> the embedding of the n-grams that end at each token, [1, T, D] or [T, 1, D].

    An n-gram does not reach back over an end token; its place is taken by end tokens, as in front of a sequence.
    """
    context, ids = context_of(module.layer_idx), input_ids.reshape(-1, 1, 1).long()  # [T, 1, 1]
    kept = Kept((1, module.context_len), "state", torch.int64)
    state = context.keep(module.layer_idx, "ngram_ids", kept)
    if state is None:
        history = ids[:, 0].expand(-1, module.ngram_size)
    else:
        history = moec_ops.shift_window(ids, state, context.slots)[:, 0]  # [T, n]
        before = torch.arange(module.context_len, -1, -1, device=ids.device)  # how far back each of them lies
        history = torch.where(before <= context.positions[:, None], history, module.eos_token_id)
    shifted, over = [history[:, -1]], torch.zeros_like(history[:, -1], dtype=torch.bool)
    for back in range(1, module.ngram_size):
        over = over | (history[:, -1 - back] == module.eos_token_id)
        shifted.append(torch.where(over, module.eos_token_id, history[:, -1 - back]))
    mixed, places = shifted[0] * module.layer_multipliers[0], []  # [T]
    for back in range(1, module.ngram_size):
        mixed = torch.bitwise_xor(mixed, shifted[back] * module.layer_multipliers[back])
        heads = slice((back - 1) * module.heads_per_ngram, back * module.heads_per_ngram)
        sizes, starts = module.ngram_heads_vocab_sizes[heads], module.ngram_heads_offsets[heads]
        places.append(torch.remainder(mixed[:, None], sizes) + starts)
    return module.ngram_embedding(torch.cat(places, 1)).view(*input_ids.shape, -1)
