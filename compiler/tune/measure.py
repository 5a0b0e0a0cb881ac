"""Measures candidates in a process of their own, and outlives whatever they do to it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moec.compiler.tune.errors import TuneError
from moec.compiler.tune.record import Config, Status
from moec.compiler.tune.statistics import Ratio, paired_ratio
from moec.compiler.tune.subject import SubjectSpec
from moec.compiler.tune.worker import rss_bytes

_POLL_S = 0.05
_MODULE = "moec.compiler.tune.worker"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a candidate may take: seconds of each part, and bytes beyond what the process had before it.

    time_s: of the timed part, beside the pairs' own budget; it says how long a single call may be.
    """

    setup_s: float = 600.0
    build_s: float = 180.0
    check_s: float = 90.0
    time_s: float = 60.0
    wait_s: float = 900.0
    memory_bytes: int = 2 << 30


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long a candidate is timed: at least and at most so many pairs, seconds after which no further pair begins.

    stop_ratio: a candidate that never came below it is dropped after the fewest pairs. cpu_clock: times are of the
    process's processor time, which other processes disturb less; it says something of one thread alone.
    """

    fewest: int
    most: int
    budget_s: float
    stop_ratio: float = float("inf")
    cpu_clock: bool = False


@dataclasses.dataclass(frozen=True)
class Measurement:
    """status, reason: as in Record. pairs: seconds of the candidate and of the incumbent."""

    status: Status
    reason: str
    pairs: tuple[tuple[float, float], ...] = ()

    @property
    def ratio(self) -> Ratio:
        """Candidate over incumbent. Raises: ValueError: it was not timed."""
        return paired_ratio(self.pairs)


@dataclasses.dataclass(frozen=True)
class _Ended:
    """The process did not answer."""

    status: Status
    reason: str


class Measurer:
    """One measuring process, started anew after a candidate broke it.

    lock: a file that all processes name that time on this machine. threads: of the process, 0: as here.
    """

    def __init__(self, subject: SubjectSpec, limits: Limits | None = None, lock: Path | None = None) -> None:
        self._subject, self._limits = subject, limits or Limits()
        self._lock = lock or default_lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._task: dict[str, Any] | None = None
        self._prepared = False
        self._most_bytes = 0
        self.restarts = -1

    def prepare(self, task: dict[str, Any]) -> None:
        """The task of the measurements that follow."""
        self._task, self._prepared = task, False

    def measure(self, config: Config, against: Config, effort: Effort, seed: int) -> Measurement:
        """Checks and times a candidate in turn with the incumbent `against`.

        Raises: TuneError: no process can be started, or the incumbent itself gives wrong results.
        """
        self._ready()
        request = {
            "config": config, "against": against, "seed": seed, "lock": str(self._lock),
            "pairs": [effort.fewest, effort.most], "budget_s": effort.budget_s,
            "stop_ratio": min(effort.stop_ratio, sys.float_info.max), "cpu_clock": effort.cpu_clock,
        }  # fmt: skip
        answer = self._ask(request, effort.budget_s)
        if isinstance(answer, _Ended):
            return Measurement(answer.status, answer.reason)
        if answer["status"] == "error":
            raise TuneError(f"{answer['reason']} (configuration {against}); report it as a defect of the kernel")
        if answer["status"] not in ("ok", "rejected"):
            self.stop()  # it may have written where it should not
        return Measurement(answer["status"], answer["reason"], tuple((a, b) for a, b in answer["pairs"]))

    def stop(self) -> None:
        """Ends the process; the next measurement starts another."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._requests.close()
        os.close(self._replies)
        self._errors.close()
        self._process, self._prepared = None, False

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _ready(self) -> None:
        """A process with the task's inputs."""
        if self._task is None:
            raise TuneError("nothing was prepared; call prepare first")
        if self._process is None:
            self._start()
            first = {**dataclasses.asdict(self._subject), "memory_bytes": self._limits.memory_bytes}
            self._must(self._ask(first, 0.0), "start")
        if not self._prepared:
            self._most_bytes = 0
            answer = self._must(self._ask({"task": self._task}, 0.0), "make its inputs")
            self._most_bytes = answer["rss_bytes"] + self._limits.memory_bytes
            self._prepared = True

    def _must(self, answer: dict[str, Any] | _Ended, what: str) -> dict[str, Any]:
        if isinstance(answer, _Ended):
            raise TuneError(f"the measuring process could not {what}: {answer.status}, {answer.reason}")
        return answer

    def _start(self) -> None:
        to_child, requests = os.pipe()
        replies, from_child = os.pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by stop)
        command = [sys.executable, "-m", _MODULE, str(to_child), str(from_child)]
        self._process = subprocess.Popen(
            command, pass_fds=(to_child, from_child), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=self._errors, start_new_session=True,
        )  # fmt: skip
        os.close(to_child)
        os.close(from_child)
        self._requests, self._replies, self._unread = os.fdopen(requests, "w"), replies, b""
        self._most_bytes = 0
        self.restarts += 1

    def _ask(self, request: dict[str, Any], budget_s: float) -> dict[str, Any] | _Ended:
        """The reply, or how the process ended instead. It is dead then."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
        answer = self._await(budget_s)
        if isinstance(answer, _Ended):
            self.stop()
        return answer

    def _await(self, budget_s: float) -> dict[str, Any] | _Ended:
        """Reads phases and the reply, watching the clock and the memory."""
        phase, since = "setup", time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            while True:
                if selector.select(_POLL_S):
                    block = os.read(self._replies, 1 << 16)
                    if not block:
                        return self._death()
                    *lines, self._unread = (self._unread + block).split(b"\n")
                    for line in lines:
                        message = json.loads(line)
                        if "reply" in message:
                            return dict(message["reply"])
                        phase, since = message["phase"], time.monotonic()
                if ended := self._over(phase, time.monotonic() - since, budget_s):
                    return ended

    def _over(self, phase: str, seconds: float, budget_s: float) -> _Ended | None:
        """What limit is exceeded, None: none."""
        limits = self._limits
        most = {
            "setup": limits.setup_s, "prepare": limits.setup_s, "build": limits.build_s, "check": limits.check_s,
            "wait": limits.wait_s, "time": limits.time_s + budget_s,
        }[phase]  # fmt: skip
        if seconds > most:
            return _Ended("timeout", f"{phase}: no end after {most:g} s")
        used = rss_bytes(self._process.pid) if self._process and self._most_bytes else 0
        if used > self._most_bytes:
            mib = self._limits.memory_bytes >> 20
            return _Ended("memory", f"{phase}: the process took {mib} MiB more than before the candidate")
        return None

    def _death(self) -> _Ended:
        assert self._process is not None
        code = self._process.wait()
        self._errors.seek(0)
        last = (self._errors.read().decode(errors="replace").strip().splitlines() or [""])[-1][:200]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return _Ended("crashed", f"the process ended with {how}{': ' + last if last else ''}")


def default_lock() -> Path:
    """The file by which measuring processes of one user take turns at timing."""
    return Path(tempfile.gettempdir()) / f"moec-timing-{os.getuid()}.lock"
