"""Timelines: what is noted while an engine runs, and the file that Perfetto opens."""

from __future__ import annotations

import json

import pytest
import torch

from moec.runtime.errors import OutputError
from moec.runtime.executor import Executor
from moec.runtime.program import Buffer, Program, Step
from moec.runtime.timeline import COMMUNICATION, COMPUTE, WAIT, Recorder, Span, overlap, write_timeline


class Pending:
    """A collective under way, whose future the test completes."""

    def __init__(self) -> None:
        self.future: torch.futures.Future = torch.futures.Future()
        self.work, self.where = self, "layer 0, all_reduce of all (node r)"

    def get_future(self) -> torch.futures.Future:
        return self.future


def test_steps_and_collectives_of_a_run():
    """y = wait(all_reduce(x + x)): two steps compute, one waits, and the collective runs from its start to its end."""
    buffers = (Buffer("x", "float32", ("T",), "input"), *(Buffer(n, "float32", ("T",), "value") for n in "abc"))
    steps = (
        Step("aten", "aten.add.Tensor", "a", ({"buffer": 0}, {"buffer": 0}), outputs=(1,)),
        Step("collective", "all_reduce", "r", ({"buffer": 1},), {"group": "all"}, (2,)),
        Step("collective", "wait_tensor", "w", ({"buffer": 2}, {"buffer": 1}), outputs=(3,)),
    )
    program = Program(("T",), buffers, (0,), (3,), steps)
    started: list[Pending] = []

    def collective(step: Step):
        def start(x):
            started.append(Pending())
            return started[-1]

        def wait(pending, operand):
            pending.future.set_result(None)
            return operand

        return wait if step.name == "wait_tensor" else start

    executor = Executor(program, {}, {}, collective=collective)
    assert executor([torch.ones(2)])[0].tolist() == [2, 2]  # nothing is noted without a recorder
    executor.recorder = Recorder()
    assert executor([torch.ones(3)])[0].tolist() == [2, 2, 2]
    spans = executor.recorder.take()
    assert sorted(s.kind for s in spans) == [COMMUNICATION, COMPUTE, COMPUTE, WAIT]
    by_kind = {s.kind: s for s in spans}
    assert by_kind[COMMUNICATION].name == "layer 0, all_reduce of all (node r)"
    assert by_kind[COMMUNICATION].start_us <= by_kind[WAIT].start_us <= by_kind[COMMUNICATION].end_us
    assert all(s.start_us <= s.end_us for s in spans)


def test_overlap_is_what_both_have_in_common():
    spans = [
        Span(COMPUTE, "a", 0, 1000),
        Span(COMPUTE, "b", 1500, 2000),
        Span(WAIT, "w", 2000, 2600),
        Span(COMMUNICATION, "x", 800, 1700),
        Span(COMMUNICATION, "y", 1600, 2500),
    ]
    assert overlap(spans) == {
        "compute_ms": pytest.approx(1.5),
        "wait_ms": pytest.approx(0.6),
        "communication_ms": pytest.approx(1.7),
        "overlapped_ms": pytest.approx(0.7),  # 800 to 1000 and 1500 to 2000
    }


def test_the_file_has_a_process_per_rank_and_tracks_without_overlaps(tmp_path):
    ranks = [
        [Span(COMPUTE, "a", 10, 20), Span(COMMUNICATION, "x", 12, 30), Span(COMMUNICATION, "y", 15, 18)],
        [["compute", "b", 11, 13]],  # as JSON brings it from another rank
    ]
    write_timeline(tmp_path / "t.json", ranks)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    spans = [(e["pid"], e["tid"], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert spans == [(0, 0, "a", 0, 10), (0, 1, "x", 2, 18), (0, 2, "y", 5, 3), (1, 0, "b", 1, 2)]
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert named == {(0, 0): "steps", (0, 1): "communication", (0, 2): "communication 2", (1, 0): "steps"}
    with pytest.raises(OutputError, match="cannot be written"):
        write_timeline(tmp_path, ranks)
