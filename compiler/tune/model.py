"""A small model of cost: Bayesian ridge regression of the logarithm of a candidate's ratio to its default.

What it sees of a candidate are its knobs' distances from the default in octaves, their squares, and both times the
octaves of the token count; so it can carry what was learned at one token count to another. A few dozen samples are
all that a tuning run has for a problem, and there a linear model with an honest variance beats trees.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from moec.compiler.tune.record import Config, Value

NOISE = 0.03  # standard deviation of a measured log ratio
_SCALE = {"bias": 0.03, "line": 0.05, "square": 0.02, "tokens": 0.01, "kernel": 0.3}  # prior deviation per octave


@dataclasses.dataclass(frozen=True)
class Sample:
    """A measured candidate: its log ratio to the default at so many tokens, and the deviation of that figure."""

    config: Config
    tokens: int
    log_ratio: float
    deviation: float = NOISE


class CostModel:
    """Predicts log ratios. default: what ratios are to; it is predicted 0 everywhere."""

    def __init__(self, default: Config, samples: Iterable[Sample], tokens: int) -> None:
        self._default, self._tokens = default, tokens
        self._samples = list(samples)
        names = sorted({n for s in self._samples for n in s.config} | set(default))
        kernels = sorted({str(s.config.get("kernel")) for s in self._samples} - {str(default.get("kernel"))})
        self._names, self._kernels = [n for n in names if n != "kernel"], kernels
        self._fit()

    def _fit(self) -> None:
        prior = np.array(self._prior())
        self._precision = np.diag(prior**-2.0)
        moment = np.zeros(len(prior))
        for s in self._samples:
            f = self._features(s.config, s.tokens)
            weight = 1 / (max(s.deviation, NOISE) ** 2)
            self._precision += weight * np.outer(f, f)
            moment += weight * f * s.log_ratio
        self._covariance = np.linalg.inv(self._precision)
        self._mean = self._covariance @ moment

    def _prior(self) -> list[float]:
        each = [_SCALE["line"], _SCALE["square"], _SCALE["tokens"], _SCALE["tokens"]]
        return each * len(self._names) + [_SCALE["kernel"], _SCALE["tokens"] * 3] * len(self._kernels)

    def _features(self, config: Mapping[str, Value], tokens: int) -> np.ndarray:
        octaves = math.log2(max(1, tokens) / max(1, self._tokens))
        values: list[float] = []
        for name in self._names:
            own = self._default.get(name)
            distance = _octaves(config[name]) - _octaves(own) if name in config and own is not None else 0.0
            values += [distance, distance * distance, distance * octaves, distance * distance * octaves]
        for kernel in self._kernels:
            is_it = float(config.get("kernel") == kernel)
            values += [is_it, is_it * octaves]
        return np.array(values)

    def predict(self, config: Config, tokens: int | None = None) -> tuple[float, float]:
        """(expected log ratio, its standard deviation) at a token count, by default the model's."""
        f = self._features(config, self._tokens if tokens is None else tokens)
        return float(f @ self._mean), float(math.sqrt(max(0.0, f @ self._covariance @ f)))


def _octaves(value: Value) -> float:
    """A knob's value on a logarithmic scale; truth values and 0 count as one octave apart from 1."""
    number = int(value) if not isinstance(value, str) else 0
    return math.log2(number) + 1 if number > 0 else 0.0


def best_of(model: CostModel, configs: Sequence[Config], optimism: float = 0.0) -> Config:
    """The configuration of least expected ratio, less `optimism` deviations. Raises: ValueError: none given."""

    def score(config: Config) -> float:
        mean, deviation = model.predict(config)
        return mean - optimism * deviation

    return min(configs, key=score)
