"""What an engine's kernels are configured with: measured winners at their token counts, transfer between and beyond."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moec.compiler.kernels.spec import ExpertsProblem
from moec.compiler.lowering.cost_model import TOKEN_GRID
from moec.compiler.lowering.tuned import Tuned
from moec.compiler.tune import transfer
from moec.compiler.tune.database import Database
from moec.compiler.tune.environment import experts_key
from moec.compiler.tune.misses import why_nothing_fits
from moec.compiler.tune.record import Key, Record
from moec.compiler.tune.routing import preferred
from moec.compiler.tune.space import experts_space


class DatabaseTuning:
    """A tuning database as lowering asks it. level: of the target; the processor and threads are this machine's.

    Raises: DatabaseError: the file is absent or no tuning database.
    """

    def __init__(self, path: Path, level: str) -> None:
        self._path, self._level = path, level
        with Database(path, read_only=True) as database:
            self._records = database.records()

    def ranges(self, problem: ExpertsProblem, kernel: str) -> Sequence[Tuned] | str:
        """Ranges of T that end at measured token counts and at those where lowering compares kernels."""
        key = experts_key(problem, self._level, 1, "uniform")
        known = [r for r in self._records if _is_of(r.key, key)]
        if not known:
            of_layer = [r.key for r in self._records if (r.key.op, r.key.shape) == (key.op, key.shape)]
            return why_nothing_fits(self._path.name, key, of_layer, f"{key.op} {key.shape}", "`moec tune` makes them")
        canonical = experts_space(problem, self._level, 1).default["kernel"]
        if kernel != canonical:
            return f"{self._path.name}: {kernel} was chosen, and {canonical} is what tuning starts from"
        routing = preferred(r.key.routing for r in transfer.relatives(key, known)) or "uniform"
        tokens = sorted({*TOKEN_GRID, *(r.key.tokens for r in known)})
        found = [self._at(problem, count, routing, known) for count in tokens]
        *most, last = [(one, end) for one, end in zip(found, tokens, strict=True)]
        return [_until(one, end) for one, end in most] + [_until(last[0], None)]

    def _at(self, problem: ExpertsProblem, tokens: int, routing: str, known: list[Record]) -> Tuned:
        key = experts_key(problem, self._level, tokens, routing)
        winner = next((r for r in known if r.key == key and r.is_winner), None)
        space = experts_space(problem, self._level, tokens)
        if winner is not None and winner.is_default:
            why = f"measured at T={tokens}, {routing} routing: nothing was faster"
            return Tuned(tokens, space.default, "default", why, 1.0, None, winner.median_us)
        if winner is not None:
            bound = f"{winner.ratio or 1:.3f} of the default's time, at most {winner.ratio_high or 1:.3f} (95 %)"
            why = f"measured at T={tokens}, {routing} routing: {bound}, {winner.samples} pairs"
            return Tuned(tokens, winner.config, "measured", why, winner.ratio, None, winner.median_us)
        predicted = transfer.predict(key, space, known)
        if predicted is None:
            return Tuned(tokens, space.default, "default", "nothing was measured of this layer")
        source = "default" if predicted.config == space.default else "predicted"
        return Tuned(tokens, predicted.config, source, predicted.source, predicted.ratio, predicted.loss)


def _is_of(found: Key, wanted: Key) -> bool:
    """Whether a key is of the same layer, kernels and tools, on this device or a sibling."""
    names = ("kernel_sha256", "op", "shape", "weight_format", "toolchain")
    alike = all(getattr(found, n) == getattr(wanted, n) for n in names)
    return alike and transfer.sibling_devices(found.device) == transfer.sibling_devices(wanted.device)


def _until(one: Tuned, end: int | None) -> Tuned:
    return Tuned(end, one.config, one.source, one.why, one.ratio, one.expected_loss, one.measured_us)
