"""Refusal: why a block was not lifted. Lifting refuses rather than guesses; every stage may."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Refusal:
    """stage: which step refused ("partition", "line coverage", ..).  reason: one line about what was seen."""

    stage: str
    reason: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"


class Refused(Exception):
    """Raised inside lifting; lift_block turns it into a Refusal."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"{stage}: {reason}")
        self.refusal = Refusal(stage, reason)

    @property
    def stage(self) -> str:
        """The part of lifting that gave up."""
        return self.refusal.stage
