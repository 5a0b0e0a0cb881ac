"""Tokens per second of a server under load, from step times.

Requests of equal lengths all wait at the start (the offline benchmark that vendors publish). A request enters when its
whole prompt and output fit in the cache (no eviction), at most `max_sequences` at a time; prompts are processed in
the same steps as decodes, up to `max_step_tokens` tokens a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from moec.passes.placement.cost import StepLoad

MAX_SEQUENCES = 4096
MAX_STEP_TOKENS = 32768
_SLICES = 16
"""Time slices per output length in the simulation: each slice holds the cohort of requests that entered together."""


@dataclass(frozen=True)
class Workload:
    """Prompt and output lengths in tokens, and how many requests; num_requests 0 means a queue that never empties."""

    prompt_len: int
    gen_len: int
    num_requests: int = 0

    @property
    def total_len(self) -> int:
        """Tokens of a whole request, prompt and output: what its cache has to hold."""
        return self.prompt_len + self.gen_len


def engine_limits(sequences_that_fit: float, workload: Workload) -> tuple[int, int]:
    """Most sequences in flight and most tokens in one step.

    The step is sized so that prompts enter as fast as outputs leave. Source: the tuning rule of TensorRT-LLM's
    benchmark (at most 4096 sequences; at most 32768 and at least 2048 tokens).
    """
    most = max(1, math.floor(min(sequences_that_fit, MAX_SEQUENCES)))
    tokens = min(most * (1 + workload.prompt_len / workload.gen_len), MAX_STEP_TOKENS)
    return most, max(2048, math.ceil(tokens))


def steady_load(sequences: float, workload: Workload) -> StepLoad:
    """The step of a full server: every sequence decodes, and as many prompt tokens enter as leave."""
    return StepLoad(
        sequences,
        workload.prompt_len + workload.gen_len / 2,
        sequences * workload.prompt_len / workload.gen_len,
        workload.prompt_len / 2,
    )


def tokens_per_second(
    step_seconds: Callable[[StepLoad], float], sequences_that_fit: float, workload: Workload
) -> float:
    """Output tokens per second: steady state, or over a finite number of requests with its start and its tail."""
    most, step_tokens = engine_limits(sequences_that_fit, workload)
    if not workload.num_requests:
        return most / step_seconds(steady_load(most, workload))
    return workload.num_requests * workload.gen_len / _finite_seconds(step_seconds, most, step_tokens, workload)


def _finite_seconds(
    step_seconds: Callable[[StepLoad], float], most: int, step_tokens: int, workload: Workload
) -> float:
    """Time until the last of num_requests has its last token; cohorts advance one slice of gen_len / _SLICES steps at
    a time."""
    steps, prompt = workload.gen_len / _SLICES, workload.prompt_len
    cohorts = [0.0] * _SLICES  # [i]: sequences that have done i slices
    waiting, now = float(workload.num_requests), 0.0
    while waiting > 1e-9 or sum(cohorts) > 1e-9:
        active = sum(cohorts)
        if active < 1e-9:  # nothing to decode: prompts only
            entering = min(waiting, most, max(1.0, step_tokens * steps / prompt))
            tokens = entering * prompt
            now += max(1.0, tokens / step_tokens) * step_seconds(
                StepLoad(0.0, 0.0, min(tokens, step_tokens), prompt / 2)
            )
            cohorts[0], waiting = entering, waiting - entering
            continue
        leaving = cohorts[-1]
        entering = min(waiting, most - active + leaving, (step_tokens - min(active, step_tokens)) * steps / prompt)
        context = prompt + steps * sum(c * (i + 0.5) for i, c in enumerate(cohorts)) / active
        now += steps * step_seconds(StepLoad(active, context, entering * prompt / steps, prompt / 2))
        cohorts = [entering, *cohorts[:-1]]
        waiting -= entering
    return now
