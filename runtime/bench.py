"""Times an engine: prefill and decode rates over batch sizes and prompt lengths."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moec.runtime.engine import Engine
from moec.runtime.generate import best_tokens

ROUNDS = 3


def bench_engine(
    engine: Engine,
    batches: Sequence[int],
    prompt_lens: Sequence[int],
    gen_len: int,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """One row per batch size and prompt length: medians over ROUNDS runs after one that warms up.

    Returns: [{"batch", "prompt_len", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_bytes"}]. Prompts are
        random tokens, fresh in every run; no token stops a sequence. peak_rss_bytes is the process's so far.
    """
    cases = [(b, p) for b in batches for p in prompt_lens]
    rows = []
    for done, (batch, prompt_len) in enumerate(cases):
        progress("bench", done, len(cases))
        runs = [_run(engine, batch, prompt_len, gen_len, seed) for seed in range(ROUNDS + 1)][1:]
        rows.append(
            {
                "batch": batch,
                "prompt_len": prompt_len,
                "prefill_tokens_per_s": batch * prompt_len / statistics.median(r[0] for r in runs),
                "decode_tokens_per_s": batch * gen_len / statistics.median(r[1] for r in runs),
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    progress("bench", len(cases), len(cases))
    return rows


def _run(engine: Engine, batch: int, prompt_len: int, gen_len: int, seed: int) -> tuple[float, float]:
    """-> seconds of the prefill, seconds of gen_len decode steps."""
    generator = torch.Generator().manual_seed(seed)
    feed = torch.randint(0, engine.vocab_size, (batch, prompt_len), generator=generator).tolist()
    cache = engine.new_cache(batch, prompt_len + gen_len)
    slots = [cache.allocate() for _ in range(batch)]
    started = time.perf_counter()
    logits = engine.step(cache, slots, feed)
    prefilled = time.perf_counter()
    for _ in range(gen_len):
        logits = engine.step(cache, slots, [[token] for token in best_tokens(logits)])
    return prefilled - started, time.perf_counter() - prefilled
