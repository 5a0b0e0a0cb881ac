"""Is the block a pure function of each row? No random numbers, no state, no dependence between tokens."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from moec.compiler.capture.lifting.held import scalars, tensors
from moec.compiler.capture.lifting.refused import Refused
from moec.compiler.capture.lifting.source import Source
from moec.compiler.capture.lifting.study import Study, close, run_or_refuse

NUM_ROWS = 24


def check_purity(study: Study) -> None:
    """Raises: Refused("run" | "randomness" | "state" | "cross-token")."""
    x = study.rows(NUM_ROWS)
    source = Source(study.wide)
    before = {n: t.clone() for n, t in study.leaves.items()}
    plain, around = scalars(study.wide), source.surroundings()
    numbers = _random_states()
    y = run_or_refuse(study, x)
    if not _same_states(numbers, _random_states()):
        raise Refused("randomness", "the block draws random numbers in evaluation mode")
    _check_state(study, source, before, plain, around)
    if not torch.equal(y, study.run(x)):
        raise Refused("state", "two equal calls differ")
    check_rowwise(study, x, y)


def check_rowwise(study: Study, x: Tensor, y: Tensor | None = None) -> None:
    """A row alone, in a batch, in another order and in another split must give the same.

    Raises: Refused("cross-token").
    """
    y = study.run(x) if y is None else y
    scale = y.abs().amax().clamp_min(1e-300)
    every = max(1, len(x) // NUM_ROWS)
    alone = torch.cat([study.run(x[i : i + 1]) for i in range(0, len(x), every)])
    if not close(alone, y[::every], scale):
        raise Refused("cross-token", "a token alone and in a batch give different results")
    order = torch.randperm(len(x), generator=study.generator)
    if not close(study.run(x[order]), y[order], scale):
        raise Refused("cross-token", "the result depends on the order of the tokens")
    if len(study.call.lead) >= 2 and len(x) % 2 == 0:
        lead = (*(1,) * (len(study.call.lead) - 2), 2, len(x) // 2)
        if not close(study.run(x, lead), y, scale):
            raise Refused("cross-token", "the result depends on how tokens are split into sequences")


def _random_states() -> tuple[object, ...]:
    return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]


def _same_states(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    return torch.equal(a[0], b[0]) and bool(np.array_equal(a[1], b[1])) and a[2] == b[2]  # type: ignore[arg-type]


def _check_state(
    study: Study, source: Source, before: dict[str, Tensor], plain: dict[str, str], around: dict[str, str]
) -> None:
    """Everything that a call changed; an attribute that no method reads may change, and is no leaf then."""
    outside = [n for n, v in source.surroundings().items() if around.get(n) != v]
    if outside:
        raise Refused("state", f"a call changes {outside[0]}, which lives outside the block")
    now = tensors(study.wide)
    changed = {n for n, t in before.items() if not torch.equal(t, study.leaves[n])}
    changed |= {n for n, t in now.items() if n not in before or not torch.equal(t, before[n])}
    changed |= {n for n, v in scalars(study.wide).items() if plain.get(n) != v}
    if not changed:
        return
    read = source.attributes_read()
    bad = sorted(n for n in changed if set(n.split(".")) & read)
    if bad:
        raise Refused("state", f"a call changes {', '.join(bad[:3])}, and the block reads it")
    study.notes.append(f"writes {', '.join(sorted(changed)[:3])}, which nothing in the block reads")
    study.leaves = {n: t for n, t in study.leaves.items() if n not in changed}
