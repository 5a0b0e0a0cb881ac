"""Tunes one problem: has candidates measured against the default, and names a winner or keeps the default.

Every candidate is timed in turn with the default, so all ratios have one base. The best few are timed again with more
pairs; the winner is chosen from those fresh pairs alone, and only where their bound says that it is faster. Among
winners that differ by less than TIE the one with the fewest changes is taken, so that two runs agree.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

from moec.compiler.tune.database import Database
from moec.compiler.tune.errors import TuneError
from moec.compiler.tune.measure import Effort, Measurement, Measurer
from moec.compiler.tune.model import NOISE, Sample
from moec.compiler.tune.propose import Proposer
from moec.compiler.tune.record import Config, Key, Record, config_hash
from moec.compiler.tune.space import Space

TIE = 0.02
"""Winners whose medians are so close count as equal."""
SCREEN, CONFIRM = Effort(2, 7, 2.0, 1.03), Effort(9, 31, 6.0)


@dataclasses.dataclass(frozen=True)
class Settings:
    """trials: candidates of a problem. budget_s: after which no further candidate is begun, 0: none.

    screen: the first look at a candidate; confirm: at one of the `finalists`. seed: of proposals and inputs.
    """

    trials: int = 32
    budget_s: float = 0.0
    screen: Effort = SCREEN
    confirm: Effort = CONFIRM
    finalists: int = 3
    seed: int = 0

    def by_cpu_clock(self) -> Settings:
        """Timed by processor time: for one thread on a machine that others use."""
        screen, confirm = (dataclasses.replace(effort, cpu_clock=True) for effort in (self.screen, self.confirm))
        return dataclasses.replace(self, screen=screen, confirm=confirm)

    def scaled(self, share: float) -> Settings:
        """With all times multiplied."""
        screen, confirm = (
            dataclasses.replace(effort, budget_s=effort.budget_s * share) for effort in (self.screen, self.confirm)
        )
        return dataclasses.replace(self, budget_s=self.budget_s * share, screen=screen, confirm=confirm)


@dataclasses.dataclass(frozen=True)
class Event:
    """Something to show. kind: "begin", "measured", "confirmed", "end". best: least ratio of a candidate so far."""

    kind: str
    key: Key
    done: int
    total: int
    record: Record | None = None
    best: float = 1.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a problem. winner: its record, the default's where nothing is faster. known: taken from before."""

    key: Key
    winner: Record
    tried: int
    failed: int
    known: int


class Search:
    """One problem's search. worker: a name for its claims. known: samples at other token counts, for the model."""

    def __init__(
        self,
        key: Key,
        space: Space,
        database: Database,
        measurer: Measurer,
        settings: Settings,
        worker: str,
        known: Iterable[Sample] = (),
        show: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._key, self._space, self._database, self._measurer = key, space, database, measurer
        self._settings, self._worker, self._show = settings, worker, show
        self._proposer = Proposer(space, key.tokens, settings.trials, settings.seed, known)
        self._records: dict[str, Record] = {}

    def run(self, task: dict[str, Any]) -> Outcome:
        """Raises: TuneError: nothing can be measured; DatabaseError: what was found cannot be kept."""
        self._measurer.prepare(task)
        known = self._recall()
        self._report("begin")
        if config_hash(self._space.default) not in self._records:
            self._try_default()
        started = time.monotonic()  # making a process with its weights is no candidate's time
        while len(self._records) <= self._settings.trials:
            if self._settings.budget_s and time.monotonic() - started > self._settings.budget_s:
                break
            config = self._proposer.next(self._samples())
            if config is None:
                break
            self._try(config)
        winner = dataclasses.replace(self._decide(), is_winner=True)
        self._database.set_winner(self._key, winner)
        self._report("end", winner)
        failed = sum(r.status != "ok" for r in self._records.values())
        return Outcome(self._key, winner, len(self._records) - 1, failed, known)

    def _recall(self) -> int:
        """What earlier runs found out about this problem."""
        for record in self._database.records(self._key):
            if self._space.holds(record.config):
                self._remember(record)
        return len(self._records)

    def _remember(self, record: Record) -> None:
        self._records[config_hash(record.config)] = record
        self._proposer.skip(record.config)

    def _try(self, config: Config) -> None:
        """Measures and keeps a candidate, unless another worker has it."""
        if not self._database.claim(self._key, config_hash(config), self._worker):
            for record in self._database.records(self._key, config=config):
                self._remember(record)
            return
        found = self._measurer.measure(config, self._space.default, self._settings.screen, self._settings.seed)
        record = self._record(config, found)
        self._database.add(record)
        self._remember(record)
        self._report("measured", record)

    def _try_default(self) -> None:
        """Its own times, and whether it works at all: without it nothing can be compared."""
        self._database.claim(self._key, config_hash(self._space.default), self._worker)
        default = self._space.default
        found = self._measurer.measure(default, default, self._settings.screen, self._settings.seed)
        if found.status != "ok":
            raise TuneError(f"the default of {self._key.shape} at T={self._key.tokens}: {found.status}, {found.reason}")
        record = self._record(default, found, is_default=True)
        self._database.add(record)
        self._remember(record)
        self._report("measured", record)

    def _record(self, config: Config, found: Measurement, is_default: bool = False) -> Record:
        seed, created = self._settings.seed, time.time()
        record = Record(
            self._key, config, found.status, found.reason, seed=seed, worker=self._worker, created=created,
            is_default=is_default,
        )  # fmt: skip
        if found.status != "ok":
            return record
        ratio = found.ratio
        bounded = math.isfinite(ratio.high)
        return dataclasses.replace(
            record,
            median_us=statistics.median(a for a, _ in found.pairs) * 1e6,
            ratio=ratio.median,
            ratio_low=ratio.low if bounded else None,
            ratio_high=ratio.high if bounded else None,
            samples=ratio.pairs,
        )

    def _samples(self) -> list[Sample]:
        return [sample for r in self._records.values() if not r.is_default and (sample := sample_of(r))]

    def _decide(self) -> Record:
        """The finalists' fresh measurements, and of those that are faster the simplest of the best."""
        default = next(r for r in self._records.values() if r.config == self._space.default)
        timed = [r for r in self._records.values() if r.ratio is not None and r.config != self._space.default]
        finalists = sorted((r for r in timed if (r.ratio or 1.0) < 1.0), key=lambda r: r.ratio or 1.0)
        fresh = [self._confirm(r.config) for r in finalists[: self._settings.finalists]]
        faster = [r for r in fresh if r.is_faster]
        if not faster:
            return default
        best = min(r.ratio or 1.0 for r in faster)
        return min(
            (r for r in faster if (r.ratio or 1.0) <= best * (1 + TIE)), key=lambda r: self._space.rank(r.config)
        )

    def _confirm(self, config: Config) -> Record:
        seed = self._settings.seed + 1
        record = self._record(config, self._measurer.measure(config, self._space.default, self._settings.confirm, seed))
        self._database.add(record)
        self._records[config_hash(config)] = record
        self._report("confirmed", record)
        return record

    def _report(self, kind: str, record: Record | None = None) -> None:
        best = min((r.ratio for r in self._records.values() if r.ratio), default=1.0)
        self._show(Event(kind, self._key, len(self._records), self._settings.trials + 1, record, min(best, 1.0)))


def sample_of(record: Record) -> Sample | None:
    """What a model learns from a record, None where it was not timed."""
    if record.ratio is None:
        return None
    spread = math.log(record.ratio_high / record.ratio_low) / 4 if record.ratio_high and record.ratio_low else 2 * NOISE
    return Sample(record.config, record.key.tokens, math.log(record.ratio), max(NOISE, spread))
