"""The certificate: the lifted block against the original in float64, on rows built to find a difference."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from moec.compiler.capture.lifting.gate_rules import classes
from moec.compiler.capture.lifting.purity import check_rowwise
from moec.compiler.capture.lifting.refused import Refused
from moec.compiler.capture.lifting.replacement import Parts, Replacement
from moec.compiler.capture.lifting.source import Source
from moec.compiler.capture.lifting.steer import steer
from moec.compiler.capture.lifting.study import Study
from moec.compiler.capture.lifting.trace import ROWS

LIMIT = 1e-8
"""Largest relative error of a row in float64. The worst seen is 3e-15; a defect below 1e-9 is invisible."""
EXTREME_LIMIT = 1e-7
MAX_STRESS = 20000
STRESS = (300, 1200, 4100, 20000)  # rows to one expert whatever the code's numbers are, as far as time allows
STRESS_SECONDS = 2.0
MANY_SAME, MANY_TO_ONE = 65, 160
MAX_RULES = 4  # that are verified in full, one after the other
STEER = (4, 16)  # how far a steered row's logit stands out; more for experts that the first do not reach


class Verifier:
    """One run of all checks for one choice of parts.

    Gives after check(): worst (error by kind of rows), counts (uses of each expert), stress (most rows in one call),
    counterexamples (rows that a failed comparison was about).
    """

    def __init__(self, study: Study, parts: Parts) -> None:
        self.study, self.parts = study, parts
        self.lifted = Replacement(parts, study.leaves, torch.float64).materialise(study.leaves)
        self.worst: dict[str, float] = {}
        self.counterexamples: list[Tensor] = []
        self.counts = torch.zeros(parts.partition.num_experts, dtype=torch.long)
        self.source = Source(study.wide)
        self.stress = self.num_comparisons = 0
        self.lines: dict[str, int] = {}
        self.finite_at_zero = self._finite_at_zero()

    def check(self) -> None:
        """Raises: Refused("verify" | "coverage" | "line coverage" | "predicate coverage" | "cross-token")."""
        with self.source:
            self._ordinary_rows()
            self._each_expert()
        self._all_seen()
        with self.source:
            self._stress()
            self._native_run()
        self._line_coverage()
        self._predicate_coverage()

    @torch.no_grad()
    def compare(self, x: Tensor, what: str, limit: float = LIMIT) -> None:
        """Raises: Refused("verify"): a row differs by more than the limit, relative to its size."""
        a, b = self.study.run(x), self.lifted.lifted(x)
        size = a.abs().amax(1).clamp_min(float(a.abs().max()) * 1e-6).clamp_min(1e-300)
        error = (a - b).abs().amax(1) / size
        self.worst[what] = max(self.worst.get(what, 0.0), float(error.max()))
        if not bool((error <= limit).all()):
            self.counterexamples.append(x[~(error <= limit)][:64].clone())
            raise Refused("verify", f"{what}: relative error {float(error.max()):.2g}")
        experts = self.lifted.route(x)[1].reshape(-1).long()
        self.counts += torch.bincount(experts[experts < len(self.counts)], minlength=len(self.counts))

    def _ordinary_rows(self) -> None:
        rows = self.study.rows
        for scale in (0.03, 1.0, 30.0):
            x = self._accepted(rows(48, scale)) if scale > 1 else rows(48, scale)
            if len(x):
                self.compare(x, f"random rows times {scale:g}")
        for count in (1, 2, 3, 17):
            self.compare(rows(count), f"{count} rows")
        if self.finite_at_zero:
            self.compare(torch.zeros(3, self.study.hidden, dtype=torch.float64), "zero rows")
        self.compare(rows(1).expand(MANY_SAME, -1).contiguous(), f"{MANY_SAME} equal rows")

    def _accepted(self, x: Tensor) -> Tensor:
        """Those of large rows that the block itself takes: on the others it fails, or gives no finite number."""
        try:
            kept = torch.isfinite(self.study.run(x)).all(1)
        except Exception as error:  # whatever the block's own code raises
            self.study.notes.append(f"the block fails on large rows ({type(error).__name__}); none were compared")
            return x[:0]
        if not kept.all():
            self.study.notes.append(f"{int((~kept).sum())} of {len(x)} large rows give no finite number")
        return x[kept]

    def _each_expert(self) -> None:
        """Rows that lead to each expert, many rows to one expert; more random rows while some expert is unseen."""
        num_logits = self.parts.router.num_logits
        for outstanding in STEER:
            noise = torch.randn(3 * num_logits, num_logits, generator=self.study.generator, dtype=torch.float64)
            every = torch.arange(len(noise))
            targets = noise * 0.3
            targets[every, every % num_logits] += outstanding
            x = steer(self.study, self.parts.router, targets)
            if len(x):
                self.compare(x, "rows steered to each expert")
                crowd = x[:1] + 1e-3 * self.study.rows(MANY_TO_ONE)
                self.compare(crowd, f"{MANY_TO_ONE} rows to one expert")
                check_rowwise(self.study, crowd)
            if bool((self.counts > 0).all()):
                break
        for scale in (1.0, 5.0):
            if (self.counts == 0).any():
                self.compare(self.study.rows(400, scale), "search for unseen experts")

    def _all_seen(self) -> None:
        missing = (self.counts == 0).nonzero()[:, 0].tolist()
        if missing:
            uses = int(self.counts.sum())
            raise Refused("coverage", f"experts {missing[:6]} are never chosen in {uses} choices of the probes")

    def _stress(self) -> None:
        """As many rows to one expert as lie above every integer of the code that no dimension explains."""
        tensors = self.study.leaves.values()
        known = {s for t in tensors for s in t.shape} | {
            self.study.hidden,
            len(self.counts),
            self.parts.partition.top_k,
        }
        odd = [c for c in self.source.integers() - known if c <= MAX_STRESS]
        most = max([0, *(2 * c + 1 for c in odd)])
        seconds = 0.0
        for count in STRESS:
            if seconds * (count / STRESS[0]) ** 2 > STRESS_SECONDS:  # slow where Python sees each token
                break
            start = time.monotonic()
            self._crowd(count)
            if count > STRESS[0]:
                self.compare(self.study.rows(count), "many random rows")
            seconds = (time.monotonic() - start) * (STRESS[0] / count) ** 2
        if most > self.stress:
            self._crowd(min(MAX_STRESS, most))

    def _crowd(self, count: int) -> None:
        self.compare(self.study.rows(1) + 1e-3 * self.study.rows(count), "stress rows")
        self.stress = count

    def _native_run(self) -> None:
        """Branches on the dtype show in the block's own dtype only."""
        own = self.source
        with Source(self.study.module) as native:
            self.study.native(self.study.rows(64).to(self.study.call.dtype))
        for code, lines in native.hit.items():
            own.hit.setdefault(code, set()).update(lines)

    def _line_coverage(self) -> None:
        unreadable = self.source.unreadable()
        if unreadable:
            raise Refused("line coverage", f"the source of {unreadable[0]} cannot be read")
        missed = self.source.missed()
        self.lines = {"total": self.source.num_lines(), "missed_behind_constants": len(missed)}
        for text, explained in missed:
            if not explained:
                raise Refused("line coverage", f"never executed and not behind a constant: {text}")

    def _predicate_coverage(self) -> None:
        """Every comparison that depends on the rows must have gone both ways; rows of extreme size must agree."""
        rows = self.study.rows
        probe = [rows(60), rows(20, 1e-4), self._accepted(rows(20, 1e4)), rows(1) + 1e-3 * rows(100)]
        if self.finite_at_zero:
            probe.append(torch.zeros(2, self.study.hidden, dtype=torch.float64))
        x = torch.cat(probe)
        traces = [self.study.trace(p) for p in (x, rows(1), rows(3), rows(1).expand(MANY_SAME, -1).contiguous())]
        self._extreme(x)
        outcomes: dict[tuple[Any, ...], set[bool]] = {}
        for c in (c for t in traces for c in t.comparisons if ROWS in c.taint):
            outcomes.setdefault((c.name, c.place), set()).update(c.outcome.reshape(-1).unique().tolist())
        self.num_comparisons = len(outcomes)
        for (name, place), seen in outcomes.items():
            if len(seen) == 1:
                where = f" in {place[0]} line {place[1]}" if place else ""
                raise Refused("predicate coverage", f"comparison {name}{where} on data has one outcome on every probe")

    def _extreme(self, x: Tensor) -> None:
        with torch.no_grad():
            a, b = self.study.run(x), self.lifted.lifted(x)
        differ = torch.isfinite(a).all(1) & ~(
            (a - b).abs().amax(1) <= EXTREME_LIMIT * a.abs().amax(1).clamp_min(1e-300)
        )
        if not differ.any():
            return
        tied = self._tied(x)
        if (differ & ~tied).any():
            raise Refused("verify", f"{int((differ & ~tied).sum())} of {len(x)} rows of extreme size differ")
        self.study.notes.append(f"{int(differ.sum())} saturated rows tie exactly; the original picks another expert")

    def _tied(self, x: Tensor) -> Tensor:
        """Rows whose best logits, or saturated scores, are exactly equal (scores that are zero make no difference)."""
        spec = self.parts.spec
        if spec is None:  # a graph picks as the original does
            return torch.zeros(len(x), dtype=torch.bool)
        logits = self.parts.router.logits_of(self.study, x)
        scores = [logits, spec.transformed(logits), *([logits.sigmoid()] if spec.score == "sigmoid" else [])]
        best = self.parts.partition.top_k + 1
        ordered = [torch.sort(v, dim=-1, descending=True).values[:, :best] for v in scores]
        return torch.stack([(v.diff() == 0).any(1) for v in ordered]).any(0)

    def _finite_at_zero(self) -> bool:
        try:
            return bool(torch.isfinite(self.study.run(torch.zeros(3, self.study.hidden, dtype=torch.float64))).all())
        except Exception:  # whatever the block's own code raises; then zero rows are outside of what it accepts
            return False


def verified(study: Study, parts: Parts) -> tuple[Parts, Verifier]:
    """The parts with the first rule that passes, else with the graph. Raises: Refused: none does."""
    if parts.rule is not None:
        parts = _told_apart(study, parts)
    last: Refused | None = None
    against: list[Tensor] = []
    for rule in _in_order(parts):
        verifier = Verifier(study, dataclasses.replace(parts, rule=rule))
        try:
            for x in against:
                verifier.compare(x, "rows on which a rule failed")
            verifier.check()
            return verifier.parts, verifier
        except Refused as error:
            if error.stage != "verify":
                raise
            if rule is not None:
                study.notes.append(f"a rule that fits was dropped: {error}")
            last, against = error, against + verifier.counterexamples
    assert last is not None
    raise last


def _in_order(parts: Parts) -> list[int | None]:
    """Rules to verify: the chosen one, a few of another kind, then the graph."""
    if parts.rule is None:
        return [None]
    rules = parts.router.rules
    kind = lambda r: (rules[r].spec.order, rules[r].spec.bias_on, rules[r].spec.score)  # noqa: E731
    first: dict[Any, int] = {kind(parts.rule): parts.rule}
    for r in range(len(rules)):
        first.setdefault(kind(r), r)
    return [*list(first.values())[:MAX_RULES], *([None] if parts.router.graph is not None else [])]


def _told_apart(study: Study, parts: Parts) -> Parts:
    """Drops rules that rows built to tell them apart refute; the others' first one is used."""
    router = parts.router
    if len(router.rules) < 2:
        return parts
    groups, logits = classes(list(router.rules), router.num_logits, study.leaves, study.generator)
    if len(groups) < 2 or not len(logits):
        return parts
    x = steer(study, router, logits)
    if not len(x):
        return parts
    y = study.run(x)
    for group in groups:
        candidate = dataclasses.replace(parts, rule=router.rules.index(group[0]))
        lifted = Replacement(candidate, study.leaves, torch.float64).materialise(study.leaves)
        with torch.no_grad():
            error = (lifted.lifted(x) - y).abs().amax(1) / y.abs().amax(1).clamp_min(1e-300)
        if bool((error < LIMIT).all()):
            study.notes.append(f"{len(groups)} kinds of rules told apart on {len(x)} built rows")
            return candidate
    if router.graph is None:
        raise Refused("gate", f"no known rule survives rows built to tell rules apart, and {router.note}")
    return dataclasses.replace(parts, rule=None)
