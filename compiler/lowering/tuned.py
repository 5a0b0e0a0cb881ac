"""Measured or predicted configurations of a chosen kernel, by ranges of T: what a tuning database says about a site."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from moec.compiler.lowering.candidates import Candidate, Site
from moec.passes.infra.base import Ledger, Match, NoMatch


@dataclasses.dataclass(frozen=True)
class Tuned:
    """One range of T: up to max_tokens (None: all beyond the ranges before).

    config: of the kernel.  source: "measured", "predicted" (by transfer) or "default".  why: in words.
    ratio: time over the default's, 1.0 where it is the default.  expected_loss: of a prediction, over the unknown best.
    measured_us: of the measured candidate at the range's end.
    """

    max_tokens: int | None
    config: Mapping[str, Any]
    source: str
    why: str
    ratio: float | None = None
    expected_loss: float | None = None
    measured_us: float | None = None

    def to_json(self) -> dict[str, Any]:
        """For tuning.json."""
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in dataclasses.asdict(self).items()}


class Tuning(Protocol):
    """Where configurations come from."""

    def ranges(self, problem: Any, kernel: str) -> Sequence[Tuned] | str:
        """Ranges in rising order, the last without an end; or why the kernel stays as it is."""


def clipped(ranges: Sequence[Tuned], low: int, high: int | None) -> list[Tuned]:
    """The ranges as far as they lie in low < T <= high (None: all above); the last ends at high."""
    kept = []
    for one in ranges:
        if one.max_tokens is not None and one.max_tokens <= low:
            continue
        ends = one.max_tokens is None or (high is not None and one.max_tokens >= high)
        kept.append(dataclasses.replace(one, max_tokens=high) if ends else one)
        if ends:
            break
    return kept


def tuned_variants(
    chosen: Candidate, ranges: Sequence[Tuned]
) -> tuple[tuple[tuple[int | None, Candidate], ...], tuple[Tuned, ...]]:
    """The candidates of the ranges and the ranges, neighbours of one configuration and one reason made one."""
    assert chosen.configured is not None
    merged: list[Tuned] = []
    for one in ranges:
        if merged and dict(merged[-1].config) == dict(one.config) and merged[-1].source == one.source == "default":
            merged.pop()
        merged.append(one)
    made: dict[str, Candidate] = {}
    variants: list[tuple[int | None, Candidate]] = []
    for one in merged:
        candidate = made.setdefault(repr(sorted(one.config.items())), chosen.configured(one.config))
        if variants and variants[-1][1] is candidate:
            variants.pop()
        variants.append((one.max_tokens, candidate))
    return tuple(variants), tuple(merged)


def tuning_ledger(sites: Sequence[tuple[Site, tuple[Tuned, ...], str]]) -> Ledger:
    """What the database did at each site that it was asked about: matched where a range is not the default."""
    entries: list[Match | NoMatch] = []
    for site, ranges, reason in sites:
        layer = site.node.meta.get("layer")
        if any(r.source != "default" for r in ranges):
            entries.append(Match(site.node.name, layer))
        else:
            entries.append(NoMatch(reason or ranges[0].why, site.node.name, layer))
    return Ledger.of(entries)
