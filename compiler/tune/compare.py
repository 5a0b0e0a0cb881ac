"""What a set of records says: per key in short, and how two sets differ or become one."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

from moec.compiler.tune.database import Database
from moec.compiler.tune.record import Config, Key, Record, config_text, record_to_json


@dataclasses.dataclass(frozen=True)
class Summary:
    """One key in short.

    trials: records, suggestions left out.  by_status: how many ended how.  default: the newest ok record of the
    default.  winner: the record in use, None: the default is.  best: the fastest that was measured right, by ratio.
    """

    key: Key
    trials: int
    by_status: dict[str, int]
    default: Record | None
    winner: Record | None
    best: Record | None

    @property
    def speedup(self) -> float:
        """Of the winner over the default, 1 where the default stays."""
        w = self.winner
        return 1.0 if w is None or w.is_default or not w.ratio else 1.0 / w.ratio

    def to_json(self) -> dict[str, Any]:
        """As `moec tune` prints it with --json."""
        records = {name: getattr(self, name) for name in ("default", "winner", "best")}
        told = {name: None if r is None else _short(r) for name, r in records.items()}
        plain = {"key": dataclasses.asdict(self.key), "trials": self.trials, "by_status": self.by_status}
        return plain | {"speedup": self.speedup} | told


def _short(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record_to_json(record).items() if name != "key"}


def by_key(records: Iterable[Record]) -> dict[Key, list[Record]]:
    """Records of each key in their order, keys sorted."""
    found: dict[Key, list[Record]] = collections.defaultdict(list)
    for record in records:
        found[record.key].append(record)
    return dict(sorted(found.items()))


def summaries(records: Iterable[Record]) -> list[Summary]:
    """One for each key, sorted."""
    return [_summary(key, group) for key, group in by_key(records).items()]


def _summary(key: Key, records: list[Record]) -> Summary:
    measured = [r for r in records if r.is_measured]
    good = [r for r in measured if r.status == "ok"]
    return Summary(
        key,
        len(measured),
        dict(sorted(collections.Counter(r.status for r in measured).items())),
        next((r for r in reversed(good) if r.is_default), None),
        next((r for r in records if r.is_winner), None),
        min((r for r in good if r.ratio is not None), key=lambda r: (r.ratio, config_text(r.config)), default=None),
    )


def rejections(records: Iterable[Record]) -> dict[str, list[tuple[str, int]]]:
    """Status -> reasons and how often each, most frequent first; of records that are not ok."""
    found: dict[str, collections.Counter[str]] = {}
    for record in records:
        if record.status != "ok":
            found.setdefault(record.status, collections.Counter())[record.reason] += 1
    return {status: counts.most_common() for status, counts in sorted(found.items())}


@dataclasses.dataclass(frozen=True)
class Difference:
    """How a key's winners differ between two sets of records.

    kind: "only-left", "only-right" (the key is missing in the other), "config" (another winner).
    within_noise: both winners' bounds on the time over the default's overlap; None where one has no bound.
    """

    key: Key
    kind: str
    left: Record | None
    right: Record | None
    within_noise: bool | None

    def to_json(self) -> dict[str, Any]:
        """As `moec tune diff` prints it with --json."""
        sides = {n: None if r is None else _short(r) for n, r in (("left", self.left), ("right", self.right))}
        return {"key": dataclasses.asdict(self.key), "kind": self.kind, "within_noise": self.within_noise} | sides


def differences(left: Iterable[Record], right: Iterable[Record]) -> tuple[list[Difference], int]:
    """Every key that differs, and how many keys agree."""
    ours, theirs = ({s.key: s for s in summaries(records)} for records in (left, right))
    found, agree = [], 0
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if a is None or b is None:
            found.append(Difference(key, "only-right" if a is None else "only-left", _used(a), _used(b), None))
        elif _config(a) == _config(b):
            agree += 1
        else:
            found.append(Difference(key, "config", _used(a), _used(b), _overlap(_used(a), _used(b))))
    return found, agree


def _used(summary: Summary | None) -> Record | None:
    return None if summary is None else summary.winner or summary.default


def _config(summary: Summary) -> Config | None:
    used = _used(summary)
    return None if used is None else used.config


def _overlap(left: Record | None, right: Record | None) -> bool | None:
    bounds = [_bounds(r) for r in (left, right) if r is not None]
    if len(bounds) < 2 or None in bounds:
        return None
    (low_a, high_a), (low_b, high_b) = bounds  # type: ignore[misc]
    return low_a <= high_b and low_b <= high_a


def _bounds(record: Record) -> tuple[float, float] | None:
    if record.ratio_low is not None and record.ratio_high is not None:
        return record.ratio_low, record.ratio_high
    return (1.0, 1.0) if record.is_default else None


@dataclasses.dataclass(frozen=True)
class Merged:
    """added: records that were new.  conflicts: keys where both sides had a winner of another configuration, and
    which stayed."""

    added: int
    conflicts: tuple[Difference, ...]


def merge(target: Database, records: Iterable[Record]) -> Merged:
    """Adds records to a database, all or none.

    Where both have a winner, the one stays whose upper bound on its time over the default's is lower; ties go to the
    first configuration by its text. So the result is the same in whichever order databases are merged.
    """
    new = list(records)
    before, after = ({r.key: r for r in side if r.is_winner} for side in (target.records(is_winner=True), new))
    both = [key for key in sorted(before.keys() & after.keys()) if before[key].config != after[key].config]
    kept = {key: min(before[key], after[key], key=_rank) for key in before.keys() & after.keys()}
    added = target.add_all([dataclasses.replace(r, is_winner=r.is_winner and kept.get(r.key, r) is r) for r in new])
    conflicts = (Difference(k, "config", before[k], after[k], _overlap(before[k], after[k])) for k in both)
    return Merged(added, tuple(conflicts))


def _rank(record: Record) -> tuple[float, float, str]:
    high = float("inf") if record.ratio_high is None else record.ratio_high
    return high, float("inf") if record.ratio is None else record.ratio, config_text(record.config)
