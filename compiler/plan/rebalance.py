"""rebalance(): token shares of copied experts solved anew for what a running engine has counted."""

from __future__ import annotations

from typing import Any

import numpy as np

from moec.passes.placement.place_experts import resolve_shares


def rebalance(engine: Any) -> dict[int, tuple[float, float]]:
    """Gives each copy of an expert the part of its tokens that evens out the groups' load, on all ranks, from the next
    step on. Residency stays, and so do answers, up to the order of sums.

    Args: engine: a placed engine of moec.load, on rank 0, that has run.
    Returns: by layer with copied experts, the greatest load of a group over the mean, as counted: with even parts for
        all copies of an expert, and with the parts that are set now.
    Raises: RankError: a rank is lost.
    Cost: a linear program per layer, milliseconds each.
    """
    copies = engine.manifest["placement"]["copies"]
    loads = {str(c["layer"]): c["load"] for c in engine.counters()["layers"]}
    found = {}
    for layer, homes in copies.items():
        load = np.asarray(loads.get(layer, []), dtype=np.float64)
        if not load.sum():
            continue
        held = np.zeros((len(homes), 1 + max(g for groups in homes for g in groups)))
        for expert, groups in enumerate(homes):
            held[expert, groups] = 1
        share = resolve_shares((held > 0)[None], load[None] / load.sum())[0]  # [E, G]
        engine.set_token_shares(int(layer), [[float(share[e, g]) for g in groups] for e, groups in enumerate(homes)])
        even = held / held.sum(1, keepdims=True)
        found[int(layer)] = (_imbalance(load @ even), _imbalance(load @ share))
    return found


def _imbalance(load: np.ndarray) -> float:
    return float(load.max() / load.mean())
