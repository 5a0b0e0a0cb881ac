"""The measuring process: builds, checks and times candidates that may hang, crash, leak or lie, away from the search.

Started by measure.py as `python -m moec.compiler.tune.worker REQUESTS REPLIES` with two pipe ends. A line of JSON comes
in, and lines go out: {"phase": name} whenever a new part begins, so that the search knows what a silent process is at,
and at last {"reply": ..}. What a candidate prints goes nowhere. The process ends with the one that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from moec.compiler.tune.record import Config, config_text
from moec.compiler.tune.subject import Subject, SubjectSpec

LEAK_BYTES = 32 << 20
"""Growth of the process over one measurement that no honest candidate has: inputs and results are allocated before."""
DISTURBED = 0.05
"""Share of a time that threads waited for a processor, above which it says more of the others than of the candidate."""
SHORTEST_S = 2e-4  # calls are repeated until a time is at least so long
_SPARE_BYTES = 4 << 30
_PR_SET_PDEATHSIG = 1


class Session:
    """What the process keeps between requests. say: tells the search which phase begins."""

    def __init__(self, subject: Subject, say: Callable[[str], None]) -> None:
        self._subject, self._say = subject, say
        self._trusted: set[str] = set()
        self._cpu_clock = False

    def prepare(self, task: dict[str, Any]) -> dict[str, Any]:
        """Inputs of a task. Incumbents are checked anew."""
        self._say("prepare")
        self._trusted.clear()
        self._subject.prepare(task)
        return {"rss_bytes": rss_bytes(os.getpid())}

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"status", "reason", "pairs": [[candidate's s, incumbent's s], ..]} of one candidate."""
        config, against, seed = request["config"], request["against"], int(request["seed"])
        try:
            self._say("build")
            incumbent = self._subject.build(against)
            try:
                candidate = self._subject.build(config)
            except Exception as error:
                return _ended("rejected", f"cannot be built: {_line(error)}")
            self._say("check")
            if wrong := self._check_incumbent(against, incumbent, seed):
                return _ended("error", f"the configuration to compare with is wrong: {wrong}")
            before = rss_bytes(os.getpid())
            if wrong := self._subject.check(candidate, seed):
                return _ended("wrong", wrong)
            timed = self._time(candidate, incumbent, request)
            self._say("check")
            if wrong := self._subject.check(candidate, seed + 1):
                return _ended("wrong", f"after it was timed: {wrong}")
            if wrong := self._subject.check(incumbent, seed):
                return _ended("wrong", f"it damages what others read: afterwards the incumbent has {wrong}")
        except MemoryError as error:
            return _ended("memory", _line(error))
        except Exception as error:
            return _ended("crashed", _line(error))
        if (grown := rss_bytes(os.getpid()) - before) > LEAK_BYTES:
            return _ended("memory", f"leaks: the process grew by {grown >> 20} MiB while it was timed")
        pairs = timed.pairs(request["pairs"][0])
        busy = (
            "" if len(pairs) == len(timed.clean) else f"other processes disturbed {len(timed.disturbed)} of the pairs"
        )
        return {"status": "ok", "reason": busy, "pairs": pairs}

    def _check_incumbent(self, config: Config, incumbent: Any, seed: int) -> str:
        if config_text(config) in self._trusted:
            return ""
        wrong = self._subject.check(incumbent, seed)
        if not wrong:
            self._trusted.add(config_text(config))
        return wrong

    def _time(self, candidate: Any, incumbent: Any, request: dict[str, Any]) -> _Timed:
        """Pairs, each in random order and on inputs of its own, until it is clear or the time is up.

        Pairs that other processes disturbed are used only where there are too few others.
        """
        fewest, most = request["pairs"]
        self._cpu_clock = request["cpu_clock"]
        self._say("wait")
        with alone(request["lock"]):
            self._say("time")
            rng, timed, started = random.Random(request["seed"]), _Timed([], []), time.perf_counter()
            seed = rng.randrange(1 << 30)
            repeats = self._repeats(incumbent, seed)
            self._once(candidate, seed, 1)  # the first call of a size may still allocate
            while not timed.are_enough(fewest, most, request, time.perf_counter() - started):
                seed += 2 * repeats
                first = rng.random() < 0.5
                one = self._once(candidate if first else incumbent, seed, repeats)
                two = self._once(incumbent if first else candidate, seed + repeats, repeats)
                timed.add(*((one, two) if first else (two, one)))
        return timed

    def _repeats(self, incumbent: Any, seed: int) -> int:
        """Calls that make a time long enough to be one."""
        if self._once(incumbent, seed, 1)[0] > 100 * SHORTEST_S:
            return 1
        return max(1, min(1000, int(SHORTEST_S / max(self._once(incumbent, seed, 3)[0], 1e-9))))

    def _once(self, candidate: Any, seed: int, repeats: int) -> tuple[float, bool]:
        """(seconds of a call, the mean of several on inputs of their own; whether they waited for a processor)."""
        calls = [self._subject.call(candidate, seed + n) for n in range(repeats)]
        clock = time.process_time if self._cpu_clock else time.perf_counter
        waited, started = 0.0 if self._cpu_clock else waited_s(), clock()
        for call in calls:
            call()
        took = clock() - started
        return took / repeats, not self._cpu_clock and waited_s() - waited > DISTURBED * took


@dataclasses.dataclass
class _Timed:
    """Pairs of seconds. disturbed: those in which a thread waited for a processor."""

    clean: list[tuple[float, float]]
    disturbed: list[tuple[float, float]]

    def add(self, candidate: tuple[float, bool], incumbent: tuple[float, bool]) -> None:
        """Takes a pair of (seconds, whether it was disturbed)."""
        where = self.disturbed if candidate[1] or incumbent[1] else self.clean
        where.append((candidate[0], incumbent[0]))

    def are_enough(self, fewest: int, most: int, request: dict[str, Any], seconds: float) -> bool:
        """Whether another pair is not worth its time."""
        every, late = len(self.clean) + len(self.disturbed), seconds > request["budget_s"]
        if every >= fewest and min(a / b for a, b in self.clean or self.disturbed) > request["stop_ratio"]:
            return True
        if len(self.clean) >= most or (late and len(self.clean) >= fewest):
            return True
        return every >= 2 * most or (every >= fewest and seconds > 2 * request["budget_s"])

    def pairs(self, fewest: int) -> list[tuple[float, float]]:
        """The clean ones, or all where they are too few."""
        return self.clean if len(self.clean) >= fewest else self.clean + self.disturbed


@contextlib.contextmanager
def alone(lock: str) -> Iterator[None]:
    """Only one process of the machine that names this file times at once; one that dies lets the next in."""
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def waited_s() -> float:
    """Seconds that the threads of this process were ready to run and had no processor; 0 where nobody counts them."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError):  # the thread has ended
            total += int(task.read_text().split()[1])
    return total / 1e9


def rss_bytes(pid: int) -> int:
    """Memory that a process has in use, 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def _ended(status: str, reason: str) -> dict[str, Any]:
    return {"status": status, "reason": reason, "pairs": []}


def _line(error: BaseException) -> str:
    """An exception in one line."""
    text = (str(error).strip().splitlines() or [""])[-1]
    return f"{type(error).__name__}: {text}"[:300]


def _limit_memory(num_bytes: int) -> None:
    """No more address space than now and num_bytes beside some spare: a backstop behind the search's own watch."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + num_bytes + _SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answers requests until there are none: first {"factory", "arguments", "memory_bytes"}, then tasks."""

    def send(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    def say(phase: str) -> None:
        send({"phase": phase})

    first = json.loads(requests.readline())
    say("setup")
    session = Session(SubjectSpec(first["factory"], first["arguments"]).make(), say)
    _limit_memory(first["memory_bytes"])
    send({"reply": {}})
    for line in requests:
        request = json.loads(line)
        send({"reply": session.prepare(request["task"]) if "task" in request else session.measure(request)})


def main() -> None:
    """The process: nothing that a candidate prints or reads reaches the pipes of the search."""
    _die_with_parent()
    requests, replies = (int(number) for number in sys.argv[1:3])
    with os.fdopen(requests) as incoming, os.fdopen(replies, "w") as outgoing:
        serve(incoming, outgoing)


if __name__ == "__main__":
    main()
