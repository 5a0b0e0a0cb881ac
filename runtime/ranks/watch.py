"""Who is alive and where each rank stands: what turns a lost rank into an error on all others.

Every rank keeps one connection to rank 0. A killed rank's connection closes at once; a stopped rank's heartbeats end; a
rank that computes for ever is found because others wait for it in a collective. Rank 0 tells all others, once. Main
threads learn of it in `check`; a process whose main thread does not look within GRACE_S is told on standard error, and
ends if it is not rank 0.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from moec.runtime.errors import RankError
from moec.runtime.options import RankLimits
from moec.runtime.ranks.wire import Wire

GRACE_S = 1.0
TICK_S = 0.25
LOG = logging.getLogger("moec.ranks")


@dataclasses.dataclass(frozen=True)
class Failure:
    """What happened to which rank, as a sentence without its subject: "was killed by signal 9"."""

    rank: int
    reason: str


class Watch:
    """This rank's own state, and the first failure that it heard of.

    where: the collective that the main thread waits in, "" while it computes or idles.
    """

    def __init__(self, rank: int, limits: RankLimits) -> None:
        self.rank, self.limits = rank, limits
        self.failure: Failure | None = None
        self.where, self.doing, self.closing, self.told = "", "loading", False, False
        self.counts: dict[str, int] = {}
        self._group, self._since, self._last = "", 0.0, ""
        self._lock, self._failed, self._claimed = threading.Lock(), threading.Event(), False

    def issue(self, group: str) -> None:
        """Counts a collective that this rank starts."""
        self.counts[group] = self.counts.get(group, 0) + 1

    def enter(self, where: str, group: str) -> None:
        """The main thread now waits in a collective."""
        self._group, self._since, self.where = group, time.monotonic(), where

    def leave(self) -> None:
        """The main thread has what it waited for."""
        self._last, self.where = self.where, ""

    def check(self) -> None:
        """Raises: RankError: a rank is lost."""
        if self.failure is not None:
            raise self.error(self.failure)

    def wait_failure(self, seconds: float) -> bool:
        """Whether a rank is lost, or is within the time."""
        return self._failed.wait(seconds)

    def error(self, failure: Failure) -> RankError:
        """What a survivor says."""
        self.told = True
        stood = self.where or (f"{self.doing}, last in {self._last}" if self._last else self.doing)
        return RankError(f"rank {failure.rank} {failure.reason}; rank {self.rank} was at: {stood}")

    def state(self) -> dict[str, Any]:
        """This rank's heartbeat."""
        where, waited = self.where, time.monotonic() - self._since
        return {"beat": self.rank, "group": self._group if where else "", "waited": waited, "counts": dict(self.counts)}

    def fail(self, failure: Failure) -> None:
        """Records the first failure. Others hear of it before the main thread does, which may end the process."""
        with self._lock:
            if self._claimed or self.closing:
                return
            self._claimed = True
        self._tell_failure(failure)
        self.failure = failure
        self._failed.set()
        threading.Thread(target=self._insist, daemon=True).start()

    def _tell_failure(self, failure: Failure) -> None:
        """Says so to other ranks, where this rank knew it first."""

    def _insist(self) -> None:
        """Speaks, and ends the process of a rank other than 0, where the main thread does not."""
        time.sleep(GRACE_S)
        if self.failure is None or self.closing:
            return
        if self.rank == 0:
            if not self.told:
                LOG.error("%s", self.error(self.failure))
            return
        if not self.told:
            sys.stderr.write(f"error: {self.error(self.failure)}\n")
            sys.stderr.flush()
        os._exit(1)


class Hub(Watch):
    """Rank 0's watch over the others. wires: by rank. ended: how a rank's process ended, where that is known here.

    members: group -> its ranks, of all ranks; names that several replicas use stand once for each.
    """

    def __init__(
        self,
        wires: Mapping[int, Wire],
        limits: RankLimits,
        members: list[tuple[str, tuple[int, ...]]],
        ended: Callable[[int], str],
    ) -> None:
        super().__init__(0, limits)
        self._wires, self._members, self._ended = dict(wires), members, ended
        self._seen = dict.fromkeys(wires, time.monotonic())
        self._states: dict[int, dict[str, Any]] = {}
        self._ready = {r: threading.Event() for r in wires}
        self._answers: dict[int, queue.SimpleQueue[Any]] = {r: queue.SimpleQueue() for r in wires}
        for rank in wires:
            threading.Thread(target=self._listen, args=(rank,), daemon=True).start()
        threading.Thread(target=self._tick, daemon=True).start()

    def tell(self, message: dict[str, Any]) -> None:
        """Sends a message to all other ranks."""
        for wire in self._wires.values():
            wire.send(message)

    def ask(self, message: dict[str, Any]) -> dict[int, Any]:
        """Sends a message that every other rank answers -> answers by rank. Raises: RankError: one is lost."""
        self.check()
        self.tell(message)
        return {rank: self._answer_of(rank) for rank in self._wires}

    def _answer_of(self, rank: int) -> Any:
        while True:
            try:
                return self._answers[rank].get(timeout=0.05)
            except queue.Empty:
                self.check()

    def wait_ready(self) -> None:
        """Until every rank has loaded its part. Raises: RankError: one is lost."""
        for event in self._ready.values():
            while not event.wait(0.05):
                self.check()

    def _tell_failure(self, failure: Failure) -> None:
        for rank, wire in self._wires.items():
            if rank != failure.rank:
                wire.send({"failed": failure.rank, "reason": failure.reason})

    def close(self) -> None:
        """Sends the other ranks home."""
        self.closing = True
        self.tell({"do": "close"})

    def disconnect(self) -> None:
        """Closes the wires; nothing can be told or heard any more."""
        for wire in self._wires.values():
            wire.close()

    def _listen(self, rank: int) -> None:
        while (message := self._wires[rank].receive()) is not None:
            self._seen[rank] = time.monotonic()
            if "beat" in message:
                self._states[rank] = message
            elif "ready" in message:
                self._ready[rank].set()
            elif "answer" in message:
                self._answers[rank].put(message["answer"])
            elif "failed" in message:
                self.fail(Failure(message["failed"], message["reason"]))
        if not self.closing:
            self.fail(Failure(rank, self._ended(rank)))

    def _tick(self) -> None:
        before = time.monotonic()
        while self.failure is None and not self.closing:
            time.sleep(TICK_S)
            now = time.monotonic()
            if now - before > 8 * TICK_S:  # this process stood still itself: what it has not heard says nothing
                self._seen = dict.fromkeys(self._seen, now)
            before = now
            self.tell({"beat": 0})
            silent = [r for r, seen in self._seen.items() if now - seen > self.limits.silent_s]
            if silent and not self.closing:
                self.fail(Failure(silent[0], f"does not answer: no heartbeat for {self.limits.silent_s:g} s"))
            self._find_stalled({**self._states, 0: self.state()})

    def _find_stalled(self, states: dict[int, dict[str, Any]]) -> None:
        """A rank that others wait for longer than allowed, though its heart beats."""
        for rank, state in states.items():
            if state["group"] and state["waited"] > self.limits.stall_s:
                group, count = state["group"], state["counts"][state["group"]]
                ranks = next(r for name, r in self._members if name == group and rank in r)
                late = [r for r in ranks if states.get(r, {}).get("counts", {}).get(group, 0) < count]
                busy = [r for r in late if not states.get(r, {}).get("group")]
                busy = busy or [r for r, s in states.items() if not s["group"]] or late or [rank]
                self.fail(Failure(busy[0], f"did not come to a collective of {group} within {self.limits.stall_s:g} s"))
                return


class Spoke(Watch):
    """The watch of a rank other than 0: hears from rank 0 what to do, and who is lost."""

    def __init__(self, rank: int, wire: Wire, limits: RankLimits) -> None:
        super().__init__(rank, limits)
        self._wire, self._heard = wire, time.monotonic()
        self._commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._tick, daemon=True).start()

    def ready(self) -> None:
        """Tells rank 0 that this rank can work."""
        self._wire.send({"ready": self.rank})

    def answer(self, content: Any) -> None:
        """Answers what rank 0 asked."""
        self._wire.send({"answer": content})

    def next_command(self) -> dict[str, Any]:
        """What rank 0 wants next. Raises: RankError: a rank is lost."""
        self.doing = "idle"
        command = self._commands.get()
        if command is None:
            self.check()
            raise RankError(f"rank {self.rank}: rank 0 is gone")
        self.doing = "computing"
        return command

    def _tell_failure(self, failure: Failure) -> None:
        """Rank 0 tells the others. Of what it said itself, or of its own end, nobody is told."""
        if failure.rank == self.rank:
            self._wire.send({"failed": failure.rank, "reason": failure.reason})

    def _listen(self) -> None:
        while (message := self._wire.receive()) is not None:
            self._heard = time.monotonic()
            if "failed" in message:
                self.fail(Failure(message["failed"], message["reason"]))
                self._commands.put(None)
            elif "do" in message:
                self.closing = self.closing or message["do"] == "close"
                self._commands.put(message)
        self.fail(Failure(0, "ended: its connection closed"))
        self._commands.put(None)

    def _tick(self) -> None:
        before = time.monotonic()
        while self.failure is None and not self.closing:
            time.sleep(TICK_S)
            now = time.monotonic()
            if now - before > 8 * TICK_S:
                self._heard = now
            before = now
            self._wire.send(self.state())
            if now - self._heard > self.limits.silent_s:
                self.fail(Failure(0, f"does not answer: no heartbeat for {self.limits.silent_s:g} s"))
                self._commands.put(None)
