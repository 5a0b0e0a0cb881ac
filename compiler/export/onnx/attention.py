"""Attention over past and present keys, and what a batch of rows is to the ragged graph.

Letters: B sequences (rows), S new tokens of each, P earlier ones, L = P + S, T = B*S, Q query heads, C kv heads,
G = Q/C, D head width. A row is a slot; a token's position is how many tokens (mask 1) lie before it in its row. What a
query does not see gets -1e30 added to its score, so that a row of padding stays finite; nobody reads it.
Meanings: moec::cached_attention, moec::biased_attention, moec::latent_attention (passes/ir).
"""

from __future__ import annotations

import math

import onnx_ir as ir
import torch

from moec.compiler.export.onnx.builder import LAST, Builder

LOWEST = -1e30


class Batch:
    """ids i64[B,S], mask i64[B,L]; pasts: past entries by the name of the ragged graph's cache."""

    def __init__(self, b: Builder, ids: ir.Value, mask: ir.Value, pasts: dict[str, ir.Value]) -> None:
        self.b, self.ids, self.pasts = b, ids, pasts
        self.presents: dict[str, ir.Value] = {}
        self._masks: dict[tuple[int, int], ir.Value] = {}
        self._shapes: dict[tuple[int | str, ...], ir.Value] = {}
        self.sizes = {"B": b.size(ids, 0), "S": b.size(ids, 1), "L": b.size(mask, 1)}
        self.is_token = b.cast(mask, torch.bool)
        before = b.op("Sub", b.op("CumSum", mask, b.number(1, torch.int64)), b.number(1, torch.int64))
        self.key_positions = b.op("Max", before, b.number(0, torch.int64))  # [B, L]
        first = b.op("Sub", self.sizes["L"], self.sizes["S"])
        self.query_positions = b.slice(self.key_positions, 1, first, LAST)  # [B, S]

    def ragged(self) -> dict[str, ir.Value]:
        """The ragged graph's own inputs but its slots: i64[T]."""
        flat = self.b.ints(-1)
        return {
            "tokens": self.b.op("Reshape", self.ids, flat),
            "positions": self.b.op("Reshape", self.query_positions, flat),
        }

    def slots(self) -> ir.Value:
        """i64[T]: the row of each token."""
        b = self.b
        zero, one = b.number(0, torch.int64), b.number(1, torch.int64)
        rows = b.op("Range", zero, b.op("Squeeze", self.sizes["B"]), one)
        every = b.op("Expand", b.unsqueeze(rows, 1), b.op("Shape", self.ids))
        return b.op("Reshape", every, b.ints(-1))

    def reshape(self, x: ir.Value, *sizes: int | str) -> ir.Value:
        """sizes: numbers (0 keeps, -1 follows) or the letters B, S, L."""
        if sizes not in self._shapes:
            self._shapes[sizes] = self.b.shape(*(self.sizes[s] if isinstance(s, str) else s for s in sizes))
        return self.b.op("Reshape", x, self._shapes[sizes])

    def append(self, cache: str, new: ir.Value, heads: int, width: int) -> ir.Value:
        """Entries [T, C, D] (heads > 0) or [T, D] behind a cache's past: [B, C, L, D] or [B, L, D]."""
        b = self.b
        if heads:
            new = b.transpose(self.reshape(new, "B", "S", heads, width), 0, 2, 1, 3)
        else:
            new = self.reshape(new, "B", "S", width)
        self.presents[cache] = b.op("Concat", self.pasts[cache], new, axis=-2)
        return self.presents[cache]

    def mask(self, window: int = 0, chunk: int = 0) -> ir.Value:
        """f32[B, 1, S, L]: 0 where a query sees a key, else LOWEST; window, chunk: as in moec::cached_attention."""
        if (window, chunk) not in self._masks:
            b = self.b
            key, query = b.unsqueeze(self.key_positions, 1, 2), b.unsqueeze(self.query_positions, 1, 3)
            keep = b.op("And", b.op("LessOrEqual", key, query), b.unsqueeze(self.is_token, 1, 2))
            if window:
                near = b.op("Greater", key, b.op("Sub", query, b.number(window, torch.int64)))
                keep = b.op("And", keep, near)
            if chunk:
                size = b.number(chunk, torch.int64)
                keep = b.op("And", keep, b.op("Equal", b.op("Div", key, size), b.op("Div", query, size)))
            zero, lowest = b.number(0.0, torch.float32), b.number(LOWEST, torch.float32)
            self._masks[window, chunk] = b.op("Where", keep, zero, lowest)
        return self._masks[window, chunk]


def cached_attention(
    batch: Batch,
    shapes: tuple[tuple[int, int], tuple[int, int]],
    values: tuple[ir.Value, ir.Value, ir.Value],
    caches: tuple[str, str],
    settings: tuple[float, int, int, float],
    sinks: ir.Value | None = None,
    bias: tuple[ir.Value, int] | None = None,
) -> ir.Value:
    """q [T,Q,D], k [T,C,D], v [T,C,Dv] in f32 -> [T,Q,Dv].

    Args: shapes: (Q, D), (C, Dv).  settings: scale, window, chunk, softcap.  sinks: [1, Q, 1, 1] or [B, Q, S, 1], one
        more score without a value.  bias: [T,Q,E] and E, added to the score of the key that is 0..E-1 tokens back.
    """
    b, (q, k, v) = batch.b, values
    (heads, width), (kv_heads, out_width) = shapes
    scale, window, chunk, softcap = settings
    keys = batch.append(caches[0], k, kv_heads, width)
    vals = batch.append(caches[1], v, kv_heads, out_width)
    queries = b.transpose(batch.reshape(q, "B", "S", heads, width), 0, 2, 1, 3)  # [B, Q, S, D]
    if scale != 1.0:
        queries = b.op("Mul", queries, b.number(scale, torch.float32))
    if heads != kv_heads:  # heads of a group share their keys without a copy
        queries = batch.reshape(queries, 0, kv_heads, -1, width)  # [B, C, G*S, D]
    scores = b.op("MatMul", queries, b.transpose(keys, 0, 1, 3, 2))
    if heads != kv_heads:
        scores = batch.reshape(scores, "B", heads, "S", "L")
    if softcap:
        cap = b.number(softcap, torch.float32)
        scores = b.op("Mul", b.op("Tanh", b.op("Div", scores, cap)), cap)
    if bias is not None:
        scores = b.op("Add", scores, _distance_bias(batch, heads, *bias))
    probabilities = _softmax(batch, b.op("Add", scores, batch.mask(window, chunk)), sinks, heads)
    if heads != kv_heads:
        probabilities = batch.reshape(probabilities, 0, kv_heads, -1, "L")
    mixed = b.op("MatMul", probabilities, vals)
    if heads != kv_heads:
        mixed = batch.reshape(mixed, "B", heads, "S", out_width)
    return batch.reshape(b.transpose(mixed, 0, 2, 1, 3), -1, heads, out_width)


def _softmax(batch: Batch, scores: ir.Value, sinks: ir.Value | None, heads: int) -> ir.Value:
    """f32 [B, Q, S, L]; the score without a value takes its share and is dropped."""
    b = batch.b
    if sinks is None:
        return b.op("Softmax", scores, axis=-1)
    column = b.op("Expand", sinks, b.shape(batch.sizes["B"], heads, batch.sizes["S"], 1))
    all_scores = b.op("Softmax", b.op("Concat", scores, column, axis=-1), axis=-1)
    return b.slice(all_scores, 3, 0, batch.sizes["L"])


def _distance_bias(batch: Batch, heads: int, bias: ir.Value, extent: int) -> ir.Value:
    """bias [T,Q,E] by distance -> [B, Q, S, L] by key; 0 from distance E on."""
    b = batch.b
    by_row = b.transpose(batch.reshape(bias, "B", "S", heads, extent), 0, 2, 1, 3)  # [B, Q, S, E]
    back = b.op("Sub", b.unsqueeze(batch.query_positions, 1, 3), b.unsqueeze(batch.key_positions, 1, 2))
    at = b.op("Clip", back, b.number(0, torch.int64), b.number(extent - 1, torch.int64))
    at = b.op("Expand", at, b.shape(batch.sizes["B"], heads, batch.sizes["S"], batch.sizes["L"]))
    near = b.op("Less", back, b.number(extent, torch.int64))
    return b.op("Where", near, b.op("GatherElements", by_row, at, axis=3), b.number(0.0, torch.float32))


def latent_attention(
    batch: Batch,
    sizes: tuple[int, int, int, int, int],
    values: tuple[ir.Value, ir.Value, ir.Value, ir.Value],
    caches: tuple[str, str],
    scale: float,
) -> ir.Value:
    """q [T,Q,nope+R], latent [T,C], k_rope [T,R], w_kv_b [Q*(nope+Dv),C] -> [T,Q,Dv]; sizes: Q, nope, R, C, Dv."""
    b, (q, latent, k_rope, w_kv_b) = batch.b, values
    heads, nope, rope, width, out_width = sizes
    latents = batch.append(caches[0], latent, 0, width)  # [B, L, C]
    ropes = batch.append(caches[1], k_rope, 0, rope)  # [B, L, R]
    w = b.reshape(w_kv_b, heads, nope + out_width, width)
    w_k, w_v = b.slice(w, 1, 0, nope), b.slice(w, 1, nope, LAST)  # [Q, nope, C], [Q, Dv, C]
    if not math.isclose(scale, 1.0):
        q = b.op("Mul", q, b.number(scale, torch.float32))
    absorbed = b.op("MatMul", b.transpose(b.slice(q, 2, 0, nope), 1, 0, 2), w_k)  # [Q, T, C]
    both = b.op("Concat", b.transpose(absorbed, 1, 0, 2), b.slice(q, 2, nope, LAST), axis=-1)  # [T, Q, C+R]
    queries = batch.reshape(both, "B", -1, width + rope)  # [B, S*Q, C+R]
    keys = b.transpose(b.op("Concat", latents, ropes, axis=-1), 0, 2, 1)  # [B, C+R, L]
    scores = b.transpose(batch.reshape(b.op("MatMul", queries, keys), "B", "S", heads, "L"), 0, 2, 1, 3)
    probabilities = b.op("Softmax", b.op("Add", scores, batch.mask()), axis=-1)  # [B, Q, S, L]
    by_token = batch.reshape(b.transpose(probabilities, 0, 2, 1, 3), "B", -1, "L")  # [B, S*Q, L]
    mixed = b.reshape(b.op("MatMul", by_token, latents), -1, heads, width)  # [T, Q, C]
    out = b.op("MatMul", b.transpose(mixed, 1, 0, 2), b.transpose(w_v, 0, 2, 1))  # [Q, T, Dv]
    return b.transpose(out, 1, 0, 2)
