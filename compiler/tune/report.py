"""What a page of tuning results shows, worked out from records: gains, places under the roof, curves, effects."""

from __future__ import annotations

import collections
import re
import statistics
from collections.abc import Sequence

from moec.compiler.tune.charts import Bar, Effect, Point, Roof
from moec.compiler.tune.compare import Summary, by_key
from moec.compiler.tune.record import Record
from moec.compiler.tune.roofline import work_of
from moec.compiler.tune.words import short_name
from moec.passes.hardware.catalogue import DEVICES

FEWEST_OF_VALUE = 3
"""Candidates that a value of a parameter needs, else its median says little."""


def bars(found: Sequence[Summary]) -> list[Bar]:
    """The gain of each problem; 1 where the default stays."""
    made = []
    for s in found:
        w = s.winner
        if w is None or w.is_default or w.ratio is None:
            made.append(Bar(short_name(s.key), 1.0, None, None))
            continue
        low, high = (None if r is None else 1 / r for r in (w.ratio_high, w.ratio_low))
        made.append(Bar(short_name(s.key), 1 / w.ratio, low, high))
    return made


def points(found: Sequence[Summary]) -> list[Point]:
    """Rates of default and winner; problems whose key does not say their work are left out.

    The winner's time is the default's times its paired ratio: medians of different moments do not compare.
    """
    made = []
    for s in found:
        work = work_of(s.key)
        if work is None or s.default is None or not s.default.median_us:
            continue
        before = work.flops / (s.default.median_us * 1e-6)
        made.append(Point(short_name(s.key), work.intensity, before, before * s.speedup))
    return made


def roof(found: Sequence[Summary]) -> Roof | None:
    """The device's own ceilings where its name is known, else the best that any candidate reached here."""
    for name in {s.key.device for s in found}:
        words = re.split(r"[^a-z0-9]+", name.lower())
        for device in DEVICES.values():
            if device.name in words and device.name != "cpu":  # that one is one machine, not every CPU
                return Roof(device.bytes_per_s, device.flops["bf16"], f"data sheet of {device.name}, bf16")
    rates = [(work_of(s.key), s.default.median_us / s.speedup) for s in found if s.default and s.default.median_us]
    known = [(w.num_bytes / us * 1e6, w.flops / us * 1e6) for w, us in rates if w is not None]
    if not known:
        return None
    return Roof(max(b for b, _ in known), max(f for _, f in known), "the most that any problem here reached")


def curves(records: Sequence[Record]) -> list[tuple[str, list[float | None], int | None]]:
    """Name, ratios in the order of trials (None: not ok) and the winner's place, of each problem."""
    made = []
    for key, group in by_key(records).items():
        trials = [r for r in group if r.is_measured]
        winner = next((i for i, r in enumerate(trials) if r.is_winner and not r.is_default), None)
        ratios = [r.ratio if r.status == "ok" else None for r in trials]
        if any(ratio is not None for ratio in ratios):
            made.append((short_name(key), ratios, winner))
    return made


def effects(records: Sequence[Record]) -> dict[str, list[Effect]]:
    """Parameter -> its values in order: time over the median of the same problem and kernel.

    A parameter of one value, or of values with too few candidates, is left out; so is a rest that others explain: this
    is what candidates took, not a model of why.
    """
    found: dict[str, dict[int | str, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for group in by_key(records).values():
        good = [r for r in group if r.status == "ok" and r.ratio]
        for kernel in {r.config.get("kernel") for r in good}:
            same = [r for r in good if r.config.get("kernel") == kernel]
            middle = statistics.median(r.ratio or 1.0 for r in same)
            for record in same:
                for name, value in record.config.items():
                    if name != "kernel":
                        found[name][value].append((record.ratio or 1.0) / middle)
        middle = statistics.median([r.ratio or 1.0 for r in good] or [1.0])
        for record in good:
            if "kernel" in record.config:
                found["kernel"][record.config["kernel"]].append((record.ratio or 1.0) / middle)
    return {name: rows for name, values in sorted(found.items()) if len(rows := _rows(values)) > 1}


def _rows(values: dict[int | str, list[float]]) -> list[Effect]:
    made = []
    for value in sorted(values, key=lambda v: (isinstance(v, str), v)):
        ratios = values[value]
        if len(ratios) >= FEWEST_OF_VALUE:
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            made.append(Effect(str(value), low, middle, high, len(ratios)))
    return made
