"""A configuration for what was not measured: other token counts, another skew, a sibling device; with what it may lose.

What was measured of the same layer elsewhere feeds the cost model; the prediction is the measured candidate of least
expected ratio. The expected loss is found by doing the same to what is known: each measured token count is predicted
from the others, and compared with its own best. A prediction that gains less than it may lose yields to the default.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

from moec.compiler.tune.environment import sibling_devices
from moec.compiler.tune.model import CostModel, Sample
from moec.compiler.tune.record import Config, Key, Record, config_hash
from moec.compiler.tune.search import sample_of
from moec.compiler.tune.space import Space

UNPROVEN_LOSS = 0.05
"""Expected loss where too little was measured to find it out."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """ratio: expected time over the default's. loss: expected time over that of the unknown best, less 1.

    source: what it was predicted from, in words.
    """

    config: Config
    ratio: float
    loss: float
    source: str


def relatives(key: Key, records: Iterable[Record]) -> list[Record]:
    """Timed records of the same layer, nearest first in kind: this device and routing, other routings, siblings."""
    same = (key.kernel_sha256, key.op, key.shape, key.weight_format, key.toolchain)
    found = [
        r
        for r in records
        if r.ratio is not None
        and (r.key.kernel_sha256, r.key.op, r.key.shape, r.key.weight_format, r.key.toolchain) == same
        and sibling_devices(r.key.device) == sibling_devices(key.device)
    ]
    here = [r for r in found if r.key.device == key.device]
    alike = [r for r in here if r.key.routing == key.routing]
    return alike or here or found


def predict(key: Key, space: Space, records: Iterable[Record]) -> Prediction | None:
    """What to use at `key`, None where nothing of the layer was measured. space: at the key's tokens."""
    known = _latest(relatives(key, records))
    if not known:
        return None
    config, ratio = _choose(space, key.tokens, known)
    loss = _expected_loss(space, known)
    at = sorted({r.key.tokens for r in known})
    near = known[0].key
    where = "" if near.device == key.device else f" on {near.device}"
    source = f"predicted from {len(known)} measurements at T={','.join(map(str, at))}, {near.routing} routing{where}"
    if config != space.default and ratio * (1 + loss) >= 1.0:
        source += f"; its gain of {1 - ratio:.1%} is not above the expected loss of {loss:.1%}"
        return Prediction(space.default, 1.0, loss, source)
    return Prediction(config, ratio, loss, source)


def _latest(records: Sequence[Record]) -> list[Record]:
    """The last record of each candidate and token count: the one with the most pairs."""
    last = {(r.key, config_hash(r.config)): r for r in records}
    return list(last.values())


def _choose(space: Space, tokens: int, known: Sequence[Record]) -> tuple[Config, float]:
    """(candidate, expected ratio): the default, or a measured one that the space has here."""
    samples = [s for r in known if not r.is_default and (s := sample_of(r))]
    model = CostModel(space.default, samples, tokens)
    kernels = {b.default.get("kernel") for b in space.branches}
    pool = {config_hash(space.default): space.default}
    for r in known:
        if r.config.get("kernel") in kernels:
            near = space.nearest(r.config)
            pool[config_hash(near)] = near
    expected = {
        name: model.predict(config)[0] + _surprise(model, config, tokens, samples) for name, config in pool.items()
    }
    expected[config_hash(space.default)] = 0.0
    best = min(expected.values())
    tied = [pool[name] for name, value in expected.items() if value <= best + 0.005]
    chosen = min(tied, key=space.rank)
    return chosen, math.exp(expected[config_hash(chosen)])


def _surprise(model: CostModel, config: Config, tokens: int, samples: Sequence[Sample]) -> float:
    """By how much the candidate's own measurements differ from the model, near token counts more than far ones."""
    total = weights = 0.0
    for s in samples:
        if s.config == config:
            weight = 0.5 ** (abs(math.log2(s.tokens / tokens)) / 3)
            total += weight * (s.log_ratio - model.predict(s.config, s.tokens)[0])
            weights += weight
    return total / (weights + 0.1)


def _expected_loss(space: Space, known: Sequence[Record]) -> float:
    """Mean loss of predicting each measured token count from the others."""
    losses = []
    tokens = sorted({r.key.tokens for r in known})
    for left_out in tokens if len(tokens) > 2 else []:
        others = [r for r in known if r.key.tokens != left_out]
        own = [r for r in known if r.key.tokens == left_out and r.ratio is not None]
        chosen, _ = _choose(space, left_out, others)
        own_samples = [s for r in own if not r.is_default and (s := sample_of(r))]
        # with its own measurements the model says what the choice costs there, measured or not
        model = CostModel(space.default, own_samples, left_out)
        best = min([r.ratio or 1.0 for r in own if r.is_winner] or [min(r.ratio or 1.0 for r in own), 1.0])
        measured = [r.ratio for r in own if r.config == chosen and r.ratio is not None]
        taken = measured[-1] if measured else math.exp(model.predict(chosen)[0])
        losses.append(max(0.0, (1.0 if chosen == space.default else taken) / min(best, 1.0) - 1))
    return statistics.mean(losses) if losses else UNPROVEN_LOSS
