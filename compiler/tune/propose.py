"""Which candidate a search tries next: all of a small space, else what did well elsewhere, then as a model says.

A small space is tried whole. In a large one the first candidates are those that the space hints at and those that were
measured at other token counts, then changes of one knob of the canonical configuration, the least known first; from
then on random candidates and neighbours of the best, as the model ranks them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from moec.compiler.tune.model import CostModel, Sample, best_of
from moec.compiler.tune.record import Config, config_hash
from moec.compiler.tune.space import Space

POOL = 256  # candidates that a model chooses among
OPTIMISM = 1.0  # deviations that an unsure candidate is credited with
_KNOWN_SHARE, _STEPS_SHARE = 0.4, 0.6  # of the trials: until then hints and known ones, until then single changes


class Proposer:
    """Candidates of one problem, in an order that the seed and the results decide.

    known: samples of the same kind of layer at other token counts, for the model.
    """

    def __init__(self, space: Space, tokens: int, trials: int, seed: int, known: Iterable[Sample] = ()) -> None:
        self._space, self._tokens, self._trials = space, tokens, trials
        self._rng = random.Random(seed)
        self._known = [s for s in known if s.config != space.default]
        self._elsewhere = [space.nearest(s.config) for s in self._known if space.has_branch(s.config)]
        self._tried = {config_hash(space.default)}
        self._all = list(space.all()) if space.size <= trials else None

    def next(self, results: Sequence[Sample]) -> Config | None:
        """A candidate that was not proposed before, None where there is none. results: of this problem so far."""
        if self._all is not None:
            chosen = next((c for c in self._all if config_hash(c) not in self._tried), None)
        else:
            chosen = self._by_model(results)
        if chosen is not None:
            self._tried.add(config_hash(chosen))
        return chosen

    def skip(self, config: Config) -> None:
        """Says that a candidate is known already."""
        self._tried.add(config_hash(config))

    def _by_model(self, results: Sequence[Sample]) -> Config | None:
        done, pool = len(results) / self._trials, list[Config]()
        if done < _KNOWN_SHARE:
            pool = self._untried([*self._space.beginnings, *self._elsewhere])
        if not pool and done < _STEPS_SHARE:
            pool = self._untried(self._single_steps())
        pool = pool or self._untried(self._pool(results)) or self._untried(self._space.all())
        if not pool:
            return None
        model = CostModel(self._space.default, [*self._known, *results], self._tokens)
        return best_of(model, pool, OPTIMISM)

    def _single_steps(self) -> list[Config]:
        """Changes of one knob of the canonical configuration, and the other alternatives as they are."""
        branches = self._space.branches
        others = [b.default for b in branches[1:]]
        return [*branches[0].steps(self._space.default), *others]

    def _pool(self, results: Sequence[Sample]) -> list[Config]:
        """Random candidates, and the neighbours of the best so far."""
        pool = [self._space.sample(self._rng) for _ in range(POOL)]
        for s in sorted(results, key=lambda s: s.log_ratio)[:3]:
            pool += self._space.branch_of(s.config).steps(s.config)
        return pool

    def _untried(self, configs: Iterable[Config]) -> list[Config]:
        """Without those proposed before and without repeats, at most so many as a model can look at."""
        found: dict[str, Config] = {}
        for config in configs:
            if len(found) >= 4 * POOL:
                break
            name = config_hash(config)
            if name not in self._tried:
                found.setdefault(name, config)
        return list(found.values())
