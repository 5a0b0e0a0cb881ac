"""From prompts to tokens: prefill in one ragged batch, decode one token per sequence and step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moec.runtime.errors import ContextError
from moec.runtime.kv_cache import KVCache
from moec.runtime.options import GenerateOptions

Advance = Callable[[KVCache, Sequence[int], Sequence[Sequence[int]]], Tensor]
"""(cache, slots, new tokens of each) -> logits [len(slots), V] of each one's last token."""


class Token(NamedTuple):
    """One generated token. finished: "" while the sequence goes on, else "stop" or "length"."""

    sequence: int
    token: int
    finished: str


def generate_tokens(
    advance: Advance, cache: KVCache, prompts: Sequence[Sequence[int]], options: GenerateOptions, stop: frozenset[int]
) -> Iterator[Token]:
    """Yields the tokens of all sequences step by step, in sequence order within a step."""
    generators = [torch.Generator().manual_seed(options.seed + i) for i in range(len(prompts))]
    live = [(i, cache.allocate()) for i in range(len(prompts))]
    feed: Sequence[Sequence[int]] = prompts
    counts = [0] * len(prompts)
    while live:
        logits = advance(cache, [slot for _, slot in live], feed)
        chosen = choose_tokens(logits, options, [generators[i] for i, _ in live])
        going, next_feed = [], []
        for (sequence, slot), token in zip(live, chosen, strict=True):
            counts[sequence] += 1
            finished = "stop" if token in stop else "length" if counts[sequence] >= options.max_new_tokens else ""
            yield Token(sequence, token, finished)
            if finished:
                cache.release(slot)
            else:
                going.append((sequence, slot))
                next_feed.append([token])
        live, feed = going, next_feed


def best_tokens(logits: Tensor) -> list[int]:
    """logits [B, V] -> the first best token of each row."""
    return logits.float().argmax(-1).tolist()  # torch looks for the largest bfloat16 five times as slowly


def choose_tokens(logits: Tensor, options: GenerateOptions, generators: Sequence[torch.Generator]) -> list[int]:
    """logits [B, V] -> one token per row: the best (temperature 0), or drawn from the kept part of the distribution.

    Draws invert the cumulated probabilities in descending order with one uniform number per row. Equal logits keep
    index order, so the same seed gives the same tokens on every machine with the same logits.
    """
    if options.temperature == 0:
        return best_tokens(logits)
    best, order = torch.sort(logits.float() / options.temperature, dim=-1, descending=True, stable=True)
    if options.top_k:
        best, order = best[:, : options.top_k], order[:, : options.top_k]
    probabilities = best.double().softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= options.top_p, 0.0)
    cumulated = probabilities.cumsum(-1)
    draws = torch.cat([torch.rand(1, 1, generator=g, dtype=torch.float64) for g in generators])  # [B, 1]
    place = torch.searchsorted(cumulated, draws.to(logits.device) * cumulated[:, -1:], right=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1  # rounding must not pick a dropped token
    return order.gather(-1, torch.minimum(place, last))[:, 0].tolist()


def check_context(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_positions: int) -> int:
    """-> the cache length that the request needs. Raises: ContextError: a sequence would leave the model's context."""
    longest = max(len(p) for p in prompts)
    needed = longest + max_new_tokens - 1  # the last token is never fed back
    if max_positions and needed > max_positions:
        raise ContextError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones pass the end of the model's context of "
            f"{max_positions}; ask for at most {max(0, max_positions - longest + 1)} new tokens"
        )
    return needed
