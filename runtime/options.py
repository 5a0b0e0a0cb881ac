"""Options of loading and generating, as frozen dataclasses."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from typing import Any

from moec.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """check_digests: compare the sha256 of every file (sizes are always compared). rank: whose program to load.

    huge_pages: large weights are copied from the mapped file to 2 MiB pages where memory allows, so that going through
    gigabytes of them needs few page-table look-ups; False: they stay views of the file, shared between processes.
    processes: of this machine that load a part of the engine at once, and share its memory.
    device: of an engine for a GPU: its name, "cuda:1", or a launch/cuda_device.py Device; None: torch's current one, of
    several ranks that of the rank's number on its machine.
    """

    check_digests: bool = True
    rank: int = 0
    huge_pages: bool = True
    processes: int = 1
    device: Any = None


@dataclasses.dataclass(frozen=True)
class RankLimits:
    """silent_s: a rank without heartbeats for so long is lost. stall_s: as long may a rank keep others waiting in a
    collective while its heart beats. join_s: as long may ranks take to start."""

    silent_s: float = 10.0
    stall_s: float = 300.0
    join_s: float = 180.0

    @classmethod
    def of_environment(cls) -> RankLimits:
        """MOEC_RANK_SILENT_S, MOEC_RANK_STALL_S, MOEC_RANK_JOIN_S. Raises: InputError: no positive number."""
        given = {}
        for field in dataclasses.fields(cls):
            name = f"MOEC_RANK_{field.name.upper()}"
            text = os.environ.get(name)
            if text is not None:
                try:
                    given[field.name] = float(text)
                except ValueError as error:
                    raise InputError(f"{name} is {text!r}; expected seconds") from error
                if not given[field.name] > 0:
                    raise InputError(f"{name} is {text}; expected more than 0 seconds")
        return cls(**given)


def rank_of_environment() -> int | None:
    """This process's rank where torchrun or a scheduler started it as one of several; None elsewhere."""
    text = os.environ.get("RANK")
    return int(text) if text is not None and "WORLD_SIZE" in os.environ else None


def local_rank() -> int:
    """Which of the ranks on this machine this process is: LOCAL_RANK, as torchrun sets it; 0 where nobody says."""
    text = os.environ.get("LOCAL_RANK", "")
    return int(text) if text.isdecimal() else 0


def ranks_of_machine(num_ranks: int) -> int:
    """How many of the ranks are on this machine: LOCAL_WORLD_SIZE, as torchrun sets it; all where nobody says."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isdecimal() and 0 < int(text) <= num_ranks else num_ranks


def network_interface() -> str | None:
    """The interface that gloo is to use between machines: GLOO_SOCKET_IFNAME; None: that of the host's name."""
    return os.environ.get("GLOO_SOCKET_IFNAME") or None


def master_of_environment() -> str:
    """The host where rank 0 can be reached."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """The environment of a rank that this process starts on its own machine; cores are shared out."""
    threads = str(max(1, (os.cpu_count() or 1) // num_ranks))
    place: dict[str, int | str] = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
    place |= {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    shared = {"OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}
    return {**shared, **{k: str(v) for k, v in place.items()}, "MASTER_PORT": str(port)}


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
