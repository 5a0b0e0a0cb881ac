"""Indexers of transformers that work on their cache's layers themselves, in moec ops (see own_methods.py).

T tokens of the ragged batch, I index heads, X the width of index keys.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import moec.passes.ir.sparse_ops  # noqa: F401  (registers torch.ops.moec)
from moec.compiler.capture.attend import ChosenBlocks
from moec.compiler.capture.context import Context, Kept
from moec.compiler.errors import UnsupportedModel

moec_ops = torch.ops.moec
INDEX_KEYS = "index_keys"  # the role of what an indexer keeps


def context_of(layer: int) -> Context:
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
