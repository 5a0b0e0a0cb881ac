"""Chooses the kernel of each site from predicted times, by ranges of T, and says why the others lost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from moec.compiler.lowering import bind_dense, bind_experts, bind_layers, bind_stored
from moec.compiler.lowering.candidates import Candidate, Site, nothing
from moec.compiler.lowering.cost_model import TOKEN_GRID
from moec.compiler.lowering.tuned import Tuned, Tuning, clipped, tuned_variants
from moec.passes.ir import cache_ops, ops

BINDINGS: dict[Any, Callable[[fx.Node, str | None], Site | None]] = {
    torch.ops.aten.linear.default: bind_dense.linear_site,
    torch.ops.aten.embedding.default: bind_stored.embedding_site,
    ops.gated_mlp._opoverload: bind_dense.mlp_site,
    ops.rms_norm._opoverload: bind_layers.norm_site,
    ops.add_rms_norm._opoverload: bind_layers.norm_site,
    ops.rope._opoverload: bind_layers.rope_site,
    ops.cached_attention._opoverload: bind_layers.attention_site,
    cache_ops.cached_attention_int8._opoverload: bind_layers.attention_site,
    ops.gate._opoverload: bind_layers.gate_site,
    ops.gate_linear._opoverload: bind_layers.gate_linear_site,
}


def site_of(node: fx.Node, level: str | None) -> Site | None:
    """The site that a node is, None where the catalogue has nothing for it but the plain library step."""
    if node.target is bind_experts.COMBINE:
        layer = bind_experts.layer_of_chain(node)
        return bind_experts.experts_site(layer, level) if layer else None
    if node.target is ops.experts._opoverload:
        layer = bind_experts.layer_of_experts(node)
        return bind_experts.experts_site(layer, level) if layer else None
    bind = BINDINGS.get(node.target)
    return bind(node, level) if bind else None


@dataclasses.dataclass(frozen=True)
class Choice:
    """variants: (largest T or None, kernel), in rising order, None last.

    tuned: what a tuning database says of each range; untuned: why it says nothing, where it was asked.
    """

    site: Site
    variants: tuple[tuple[int | None, Candidate], ...]
    tuned: tuple[Tuned, ...] = ()
    untuned: str = ""

    @property
    def kernels(self) -> list[Candidate]:
        """Of all ranges of T; one that serves two stands twice."""
        return [c for _, c in self.variants]

    def at(self, rows: int) -> Choice:
        """The choice for a number of rows that never changes."""
        return Choice(self.site, ((None, next(c for limit, c in self.variants if limit is None or rows <= limit)),))

    def without(self, low: int, high: int | None, name: str) -> Choice:
        """The choice where another site's kernel, of that name, does the work for low < T <= high (None: all above)."""
        idle, pieces, start = Candidate(name, lambda tokens: 0.0, nothing), list[tuple[float, Candidate]](), 0.0
        top = math.inf if high is None else high
        for limit, candidate in self.variants:
            end = math.inf if limit is None else limit
            for stop, chosen in ((min(end, low), candidate), (min(end, top), idle), (end, candidate)):
                if stop > start:
                    same = bool(pieces) and pieces[-1][1] is chosen
                    pieces[len(pieces) - same :] = [(stop, chosen)]
                    start = stop
        variants = tuple((None if stop == math.inf else int(stop), c) for stop, c in pieces)
        return dataclasses.replace(self, variants=variants)

    def record(self) -> dict[str, Any]:
        """What `inspect` says about the site. Times are predictions at one token."""
        first = self.variants[0][1]
        used = {c.name for c in self.kernels}
        record: dict[str, Any] = (
            {} if not (self.tuned or self.untuned) else {"tuned": [t.to_json() for t in self.tuned]}
        )
        if self.untuned:
            record["untuned"] = self.untuned
        return record | {
            "node": self.site.node.name,
            "kernel": first.name,
            "predicted_us": round(first.predict(1), 1),
            "measured_us": next((t.measured_us for t in self.tuned if t.max_tokens == 1), None),
            "variants": [{"max_tokens": limit, "kernel": c.name} for limit, c in self.variants],
            "rejected": [
                {"kernel": c.name, "reason": c.refused or _slower(c, self.variants)}
                for c in self.site.candidates
                if c.name not in used
            ],
        }


def choose(site: Site, tuning: Tuning | None = None) -> Choice:
    """The kernels of a site. One with weights in its own layout serves all T, so that no weight is stored twice.

    tuning: gives it the configuration of each range of T; all of them read the same weights.
    """
    usable = [c for c in site.candidates if c.refused is None]
    packing = [c for c in usable if c.packs]
    plain = [c for c in usable if not c.packs]
    if packing:
        best = min(packing, key=_mean_us)
        if _mean_us(best) < min(map(_mean_us, plain)):
            if tuning is not None and site.problem is not None and best.configured is not None:
                return _tuned(site, best, tuning)
            return Choice(site, ((None, best),))
    choice = Choice(site, _by_range(plain))
    return choice if tuning is None or site.problem is None else _tuned_ranges(choice, tuning)


def settled(chosen: Mapping[fx.Node, Choice]) -> dict[fx.Node, Choice]:
    """The choices of a graph's sites; where a chosen kernel does another site's work, that one does nothing."""
    done = dict(chosen)
    for choice in chosen.values():
        low = 0
        for limit, candidate in choice.variants:
            for node in candidate.absorbs:
                done[node] = done[node].without(low, limit, candidate.name)
            low = low if limit is None else limit
    return done


def _tuned(site: Site, chosen: Candidate, tuning: Tuning) -> Choice:
    ranges = tuning.ranges(site.problem, chosen.name)
    if isinstance(ranges, str):
        return Choice(site, ((None, chosen),), untuned=ranges)
    return Choice(site, *tuned_variants(chosen, ranges))


def _tuned_ranges(choice: Choice, tuning: Tuning) -> Choice:
    """Each range's kernel in the configurations of what the database says of that range."""
    variants: list[tuple[int | None, Candidate]] = []
    told: list[Tuned] = []
    reasons: list[str] = []
    low = 0
    for limit, candidate in choice.variants:
        ranges = tuning.ranges(choice.site.problem, candidate.name) if candidate.configured else ()
        if isinstance(ranges, str) or not ranges:
            variants.append((limit, candidate))
            reasons += [ranges] if isinstance(ranges, str) else []
        else:
            made, kept = tuned_variants(candidate, clipped(ranges, low, limit))
            variants, told = [*variants, *made], [*told, *kept]
        low = low if limit is None else limit
    return Choice(choice.site, tuple(variants), tuple(told), "" if told else "; ".join(dict.fromkeys(reasons)))


def _by_range(candidates: list[Candidate]) -> tuple[tuple[int | None, Candidate], ...]:
    winners = [min(candidates, key=lambda c: c.predict(t)) for t in TOKEN_GRID]
    variants: list[tuple[int | None, Candidate]] = []
    for tokens, winner, after in zip(TOKEN_GRID, winners, [*winners[1:], None], strict=True):
        if after is not winner:
            variants.append((None if after is None else tokens, winner))
    return tuple(variants)


def _mean_us(candidate: Candidate) -> float:
    """Geometric mean over the numbers of tokens."""
    return math.exp(sum(math.log(candidate.predict(t)) for t in TOKEN_GRID) / len(TOKEN_GRID))


def _slower(loser: Candidate, variants: tuple[tuple[int | None, Candidate], ...]) -> str:
    """Predicted times beside those of the chosen, at few and at many tokens, as far as it takes them."""
    parts = []
    for tokens in (1, 64, 2048):
        chosen = next(c for limit, c in variants if limit is None or tokens <= limit)
        if math.isfinite(loser.predict(tokens)):
            parts.append(f"{loser.predict(tokens):.0f} against {chosen.predict(tokens):.0f} us at T={tokens}")
    return "predicted " + ", ".join(parts)
