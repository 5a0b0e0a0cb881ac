"""The configurations that a search may try: a product of knobs for each alternative, one of them canonical."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Iterator, Mapping

from moec.compiler.kernels.experts import knobs
from moec.compiler.kernels.spec import ExpertsProblem
from moec.compiler.tune.errors import TuneError
from moec.compiler.tune.record import Config, Value, config_text


@dataclasses.dataclass(frozen=True)
class Branch:
    """One alternative. default: its own configuration. values: knob -> what it may be, the default's value included."""

    default: Config
    values: Mapping[str, tuple[Value, ...]]

    @property
    def size(self) -> int:
        """Configurations of the branch."""
        return math.prod(len(v) for v in self.values.values())

    def at(self, number: int) -> Config:
        """The configuration of that number, 0 <= number < size."""
        config = dict(self.default)
        for name, values in self.values.items():
            number, place = divmod(number, len(values))
            config[name] = values[place]
        return config

    def steps(self, config: Config) -> Iterator[Config]:
        """Configurations that differ in one knob."""
        for name, values in self.values.items():
            for value in values:
                if value != config[name]:
                    yield {**config, name: value}


@dataclasses.dataclass(frozen=True)
class Space:
    """branches: the alternatives; the first one's default is what is used without tuning. hints: where to begin."""

    branches: tuple[Branch, ...]
    hints: tuple[Config, ...] = ()

    @property
    def default(self) -> Config:
        """The canonical configuration: what every other is compared with, and what ties go to."""
        return self.branches[0].default

    @property
    def size(self) -> int:
        """Configurations in all."""
        return sum(b.size for b in self.branches)

    def all(self) -> Iterator[Config]:
        """Every configuration once."""
        for branch in self.branches:
            yield from (branch.at(n) for n in range(branch.size))

    def sample(self, rng: random.Random) -> Config:
        """A random configuration; each branch is as likely as any other."""
        branch = self.branches[rng.randrange(len(self.branches))]
        return branch.at(rng.randrange(branch.size))

    def branch_of(self, config: Config) -> Branch:
        """The alternative that a configuration belongs to. Raises: TuneError: none."""
        for branch in self.branches:
            if branch.default.get("kernel") == config.get("kernel"):
                return branch
        raise TuneError(f"no alternative of the space has kernel {config.get('kernel')!r}")

    def has_branch(self, config: Config) -> bool:
        """Whether an alternative of the space is the configuration's."""
        return any(b.default.get("kernel") == config.get("kernel") for b in self.branches)

    def holds(self, config: Config) -> bool:
        """Whether a configuration can be tried here."""
        found = [b for b in self.branches if b.default.get("kernel") == config.get("kernel")]
        fits = found and config.keys() == found[0].default.keys()
        return bool(fits) and all(config[name] in values for name, values in found[0].values.items())

    def nearest(self, config: Config) -> Config:
        """The configuration of the space that does what this one does: values that it lacks become the default's."""
        branch = self.branch_of(config)
        return {
            name: config[name] if config.get(name) in branch.values.get(name, ()) else own
            for name, own in branch.default.items()
        }

    def changes(self, config: Config) -> dict[str, Value]:
        """The knobs in which a configuration differs from the canonical one."""
        return {n: v for n, v in config.items() if self.default.get(n) != v}

    @functools.cached_property
    def beginnings(self) -> list[Config]:
        """The hints as the space has them, without repeats."""
        near = [self.nearest(c) for c in self.hints]
        return [c for n, c in enumerate(near) if c not in near[:n] and c != self.default]

    def rank(self, config: Config) -> tuple[int, str]:
        """Order in which ties are broken: fewest changes first, then by text."""
        return len(self.changes(config)), config_text(config)


@functools.cache
def experts_space(problem: ExpertsProblem, level: str, num_tokens: int) -> Space:
    """The space of one layer of experts at one number of tokens. Raises: TuneError: no kernel does the problem."""
    kernels = knobs.alternatives(problem, level, num_tokens)
    if not kernels:
        raise TuneError(f"no experts kernel of {level} does {problem}; nothing can be tuned")
    branches = (Branch(knobs.config_of(k), knobs.distinct_values(k, problem, num_tokens)) for k in kernels)
    return Space(tuple(branches), tuple(knobs.promising(kernels[0])))
