"""Attention as moec ops: which op says what a layer's attention asked for, over which caches.

T tokens of the ragged batch, Q query heads, C heads of keys, D and Dv their widths.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import moec.passes.ir.bias_ops
import moec.passes.ir.compressed_ops  # noqa: F401
from moec.compiler.capture.context import ATTENTION, Context, Kept
from moec.compiler.capture.masks import MaskMeaning
from moec.compiler.errors import UnsupportedModel

moec_ops = torch.ops.moec


@dataclasses.dataclass(frozen=True)
class ChosenBlocks:
    """What an indexer chose. chosen: i32[T, G, M], numbers of blocks of `size` tokens, -1 for none."""

    chosen: Tensor
    size: int


@dataclasses.dataclass(frozen=True)
class Entries:
    """What a compressor made of windows of `size` tokens. new [T, D]: the entry of the window that each token closes;
    chosen: i32[T, M], numbers of windows that an indexer chose, None for all."""

    new: Tensor
    chosen: Tensor | None
    size: int


@dataclasses.dataclass(frozen=True)
class Asked:
    """One call of transformers' attention interface.

    query [1,Q,T,D], key [1,C,T,D], value [1,C,T,Dv]; updated: what the layer gave to its cache (the same, or a latent
    [1,1,T,..] and a rotated key); w_kv_b: what expands a latent, None for plain attention.
    indices: i32[1,T,M], tokens that an indexer chose; blocks: the same in blocks; entries: of compressed tokens.
    bias: [1,Q,T,E], what a key counts more that is 0, 1, .. places back (see relative.py); row_sinks: [1,Q,T,1].
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    updated: tuple[Tensor, Tensor]
    w_kv_b: Tensor | None
    mask: MaskMeaning
    scale: float
    softcap: float
    sinks: Tensor | None
    indices: Tensor | None = None
    blocks: ChosenBlocks | None = None
    entries: Entries | None = None
    bias: Tensor | None = None
    row_sinks: Tensor | None = None

    @property
    def heads_last(self) -> tuple[Tensor, Tensor, Tensor]:
        """query, key and value as [T, heads, width]."""
        return tuple(t[0].transpose(0, 1) for t in (self.query, self.key, self.value))  # type: ignore[return-value]


def attend(context: Context, asked: Asked) -> Tensor | None:
    """-> [T, Q, Dv]; None in a dry run, which only notes what the layer keeps.

    Raises: UnsupportedModel: this kind of attention has no op with what was asked.
    """
    if asked.entries is not None:
        roles, shapes = ("keys", "entries"), [tuple(asked.updated[0].shape[-1:])] * 2
    elif asked.w_kv_b is not None:
        roles, shapes = ATTENTION, [tuple(t.shape[-1:]) for t in asked.updated]
    else:
        roles, shapes = ATTENTION, [(t.shape[1], t.shape[3]) for t in (asked.key, asked.value)]
    kept: Any = [context.keep(asked.layer, role, Kept(s)) for role, s in zip(roles, shapes, strict=True)]
    facts: dict[str, Any] = {"mask": asked.mask, "scale": asked.scale, "softcap": asked.softcap}
    found = context.found[asked.layer]
    context.found[asked.layer] = dataclasses.replace(found, **facts, sinks=asked.sinks is not None)
    if context.caches is None:
        return None
    caches = *kept, context.slots, context.positions
    if asked.entries is not None:
        return _over_entries(asked, asked.entries, caches)
    return _plain(asked, caches) if asked.w_kv_b is None else _latent(asked, caches)


def _refuse_unless(holds: bool, asked: Asked, what: str) -> None:
    if not holds:
        raise UnsupportedModel(f"layer {asked.layer}: {what}")


def _over_entries(asked: Asked, entries: Entries, caches: tuple[Any, ...]) -> Tensor:
    """Over the last tokens and a compressor's entries; keys are values."""
    _refuse_unless(not (asked.mask.chunk or asked.softcap), asked, "compressed attention with chunks or a soft cap")
    q, kv = asked.query[0].transpose(0, 1), asked.updated[0][0, 0]
    end = asked.sinks, asked.scale, asked.mask.window, entries.size
    return moec_ops.compressed_attention(q, kv, entries.new, entries.chosen, *caches, *end)


def _latent(asked: Asked, caches: tuple[Any, ...]) -> Tensor:
    _refuse_unless(not (asked.mask.chunk or asked.softcap), asked, "latent attention with chunks or a soft cap")
    _refuse_unless(asked.blocks is None, asked, "chosen blocks in latent attention")
    latent, rotated = asked.updated
    new = asked.query[0].transpose(0, 1), latent[0, 0], rotated[0, 0], asked.w_kv_b
    nope, window = asked.query.shape[-1] - rotated.shape[-1], asked.mask.window
    if asked.indices is None and asked.sinks is None and not window:
        return moec_ops.latent_attention(*new, *caches, asked.scale, nope)
    chosen = None if asked.indices is None else asked.indices[0]
    _refuse_unless(chosen is None or not window, asked, "chosen tokens in latent attention with a window")
    return moec_ops.sparse_latent_attention(*new, chosen, *caches, asked.sinks, asked.scale, nope, window)


def _plain(asked: Asked, caches: tuple[Any, ...]) -> Tensor:
    _refuse_unless(asked.indices is None, asked, "chosen tokens in attention without a latent")
    if asked.bias is not None:
        return _biased(asked, asked.bias, caches)
    _refuse_unless(asked.row_sinks is None, asked, "sinks of each token in attention without a position bias")
    if asked.blocks is None:
        limits = asked.mask.window, asked.mask.chunk, asked.softcap
        return moec_ops.cached_attention(*asked.heads_last, *caches, asked.sinks, asked.scale, *limits)
    limited = asked.mask != MaskMeaning() or bool(asked.softcap)
    _refuse_unless(not limited, asked, "chosen blocks in attention with a window, chunks or a soft cap")
    end = asked.sinks, asked.scale, asked.blocks.size
    return moec_ops.sparse_attention(*asked.heads_last, asked.blocks.chosen, *caches, *end)


def _biased(asked: Asked, bias: Tensor, caches: tuple[Any, ...]) -> Tensor:
    plain = asked.blocks is None and asked.sinks is None and not (asked.mask.chunk or asked.softcap)
    _refuse_unless(plain, asked, "a position bias in attention with chosen blocks, sinks, chunks or a soft cap")
    sinks = None if asked.row_sinks is None else asked.row_sinks[0, :, :, 0].t()  # [T, Q]
    new = *asked.heads_last, bias[0].transpose(0, 1), sinks
    return moec_ops.biased_attention(*new, *caches, asked.scale, asked.mask.window)
