"""Options of loading and generating, as frozen dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from moec.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """check_digests: compare the sha256 of every file (sizes are always compared). rank: whose program to load.

    huge_pages: large weights are copied from the mapped file to 2 MiB pages where memory allows, so that going through
    gigabytes of them needs few page-table look-ups; False: they stay views of the file, shared between processes.
    """

    check_digests: bool = True
    rank: int = 0
    huge_pages: bool = True


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """How tokens are chosen and when to stop.

    Args: max_new_tokens: at least 1.  temperature: 0 is greedy.  top_k: 0 is all.  top_p: in (0, 1].
          seed: sequence i draws from a generator of its own, seeded seed + i, so batching changes no draw.
          stop_tokens: a sequence ends after one of these, the token included; None: the model's end-of-text tokens.
    Raises: InputError: a value outside of its range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: Collection[int] | None = None

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
        ):
            if not ok:
                raise InputError(f"{name} is {getattr(self, name)}; expected {expected}")
