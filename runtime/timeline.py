"""What an engine did when: spans of steps and of collectives, and their form for Perfetto (Chrome's trace JSON).

A rank has a track for what its main thread does, step by step, and tracks for its collectives: from the step that
starts one to its end. Times are those of the host's wall clock, so that ranks of several machines are as near as their
clocks are.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moec.runtime.errors import OutputError
from moec.runtime.program import Step

COMPUTE, WAIT, COMMUNICATION = "compute", "wait", "communication"


class Span(NamedTuple):
    """kind: compute, wait (for a collective's end) or communication. start_us, end_us: since the epoch."""

    kind: str
    name: str
    start_us: float
    end_us: float


class Recorder:
    """Gathers spans of one rank while it is an Executor's `recorder`."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._epoch_s = time.time() - time.perf_counter()

    def steps(self, steps: Sequence[Step], marks: Sequence[tuple[int, float]]) -> None:
        """Notes the steps of a run. marks: (number of the step, when it was over), the start first."""
        for (_, before), (i, after) in itertools.pairwise(marks):
            step = steps[i]
            name = f"{step.name or step.kind} ({step.node})"
            self._note(WAIT if step.name == "wait_tensor" else COMPUTE, name, before, after)

    def follow(self, work: Any, where: str) -> None:
        """Notes a collective from now to its end. work: None where there was nothing to move."""
        if work is None:
            return
        started = time.perf_counter()
        over = work.get_future()
        over.add_done_callback(lambda _: self._note(COMMUNICATION, where, started, time.perf_counter()))

    def _note(self, kind: str, name: str, start_s: float, end_s: float) -> None:
        self._spans.append(Span(kind, name, (self._epoch_s + start_s) * 1e6, (self._epoch_s + end_s) * 1e6))

    def take(self) -> list[Span]:
        """The spans so far."""
        return list(self._spans)


def write_timeline(path: Path, ranks: Sequence[Iterable[Sequence[Any]]]) -> None:
    """Writes the spans of each rank as JSON that ui.perfetto.dev and chrome://tracing open.

    Raises: OutputError: the file cannot be written.
    """
    given = [[Span(*s) for s in spans] for spans in ranks]
    zero = min((s.start_us for spans in given for s in spans), default=0.0)
    events = [e for rank, spans in enumerate(given) for e in _events(rank, spans, zero)]
    try:
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: the trace cannot be written: {error.strerror}; choose another file") from error


def _events(rank: int, spans: Sequence[Span], zero_us: float) -> list[dict[str, Any]]:
    """A rank's process with a track for its steps and as many for collectives as run at once."""
    names, events = {0: "steps"}, list[dict[str, Any]]()
    free_at_us: list[float] = []
    for span in sorted(spans, key=lambda s: s.start_us):
        track = 0
        if span.kind == COMMUNICATION:
            lane = next((i for i, end in enumerate(free_at_us) if end <= span.start_us), len(free_at_us))
            free_at_us[lane : lane + 1] = [span.end_us]
            track = 1 + lane
            names[track] = "communication" if not lane else f"communication {lane + 1}"
        times = {"ts": span.start_us - zero_us, "dur": span.end_us - span.start_us}
        events.append({"ph": "X", "name": span.name, "cat": span.kind, "pid": rank, "tid": track, **times})
    said = [("process_name", 0, f"rank {rank}"), *(("thread_name", track, name) for track, name in names.items())]
    return [{"ph": "M", "name": n, "pid": rank, "tid": t, "args": {"name": text}} for n, t, text in said] + events


def overlap(spans: Iterable[Sequence[Any]]) -> dict[str, float]:
    """How much of a rank's communication ran beside its steps.

    -> {"compute_ms", "wait_ms": of the main thread, "communication_ms": some collective was under way,
        "overlapped_ms": and the main thread computed}
    """
    given = [Span(*s) for s in spans]
    busy = {kind: _union((s.start_us, s.end_us) for s in given if s.kind == kind) for kind in (COMPUTE, COMMUNICATION)}
    return {
        "compute_ms": _length_us(busy[COMPUTE]) / 1e3,
        "wait_ms": sum(s.end_us - s.start_us for s in given if s.kind == WAIT) / 1e3,
        "communication_ms": _length_us(busy[COMMUNICATION]) / 1e3,
        "overlapped_ms": _common_us(busy[COMPUTE], busy[COMMUNICATION]) / 1e3,
    }


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Intervals without overlaps, in order."""
    out: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def _common_us(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> float:
    """Length of what lies in intervals of both; each in order and without overlaps."""
    i = j = 0
    total = 0.0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def _length_us(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)
