"""What steps count while an engine runs, added up over its ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def summed(ranks: Iterable[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """One rank's list of counters (launch/limit.py) after the other ->

    {"slots": that any layer's experts were chosen for, "dropped": of these,
     "layers": [{"layer", "load": slots by expert, "dropped": slots by owner}]}

    layers rise; each slot is to be in one rank's list.
    """
    layers: dict[int, dict[str, Any]] = {}
    for one in (c for rank in ranks for c in rank):
        known = layers.setdefault(one["layer"], {"layer": one["layer"], "load": [], "dropped": []})
        for key in ("load", "dropped"):
            before = known[key] or [0] * len(one[key])
            known[key] = [a + b for a, b in zip(before, one[key], strict=True)]
    found = [layers[layer] for layer in sorted(layers)]
    totals = {"slots": sum(sum(c["load"]) for c in found), "dropped": sum(sum(c["dropped"]) for c in found)}
    return {**totals, "layers": found}
