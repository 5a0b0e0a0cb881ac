"""Candidates that hang, crash, leak, flood, lie or do damage: each is named for what it did, and measuring goes on."""

from pathlib import Path

import pytest

from moec.compiler.tune.errors import TuneError
from moec.compiler.tune.measure import Effort, Limits, Measurer
from moec.compiler.tune.subject import SubjectSpec

SUPPORT = Path(__file__).parents[2] / "support"
DEFAULT = {"kind": "honest", "us": 40000}
FASTER = {"kind": "honest", "us": 2000}
LIMITS = Limits(setup_s=60, build_s=20, check_s=2.5, time_s=20, memory_bytes=256 << 20)
EFFORT = Effort(6, 9, 5.0)
PLANTED = {
    "hang": ("timeout", "check: no end after 2.5 s"),
    "spin": ("timeout", "check: no end after 2.5 s"),
    "crash": ("crashed", "signal SIGSEGV"),
    "abort": ("crashed", "signal SIGABRT"),
    "leave": ("crashed", "exit code 0"),
    "raise": ("crashed", "RuntimeError: kernel said no"),
    "leak": ("memory", "leaks: the process grew by"),
    "flood": ("memory", "256 MiB more than before"),
    "liar": ("wrong", "0, expected 9"),
    "late liar": ("wrong", "after it was timed: 0, expected"),
    "vandal": ("wrong", "damages what others read"),
    "unbuildable": ("rejected", "cannot be built: ValueError: no such instruction"),
}


@pytest.fixture
def measurer(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    spec = SubjectSpec("planted_subject:Planted", {})
    with Measurer(spec, LIMITS, tmp_path / "lock") as made:
        made.prepare({})
        yield made


def test_every_planted_fault_is_named_and_survived(measurer):
    """One process after the other; after each fault an honest candidate is measured as if nothing had been."""
    for kind, (status, reason) in PLANTED.items():
        found = measurer.measure({"kind": kind, "us": 0}, DEFAULT, EFFORT, seed=3)
        assert (found.status, found.pairs) == (status, ()), f"{kind}: {found}"
        assert reason in found.reason, f"{kind}: {found.reason}"
    found = measurer.measure(FASTER, DEFAULT, EFFORT, seed=3)
    assert found.status == "ok" and found.ratio.high < 1.0
    assert measurer.restarts == len(PLANTED) - 1  # all but the one that was never run


def test_an_incumbent_that_is_wrong_ends_the_run(measurer):
    with pytest.raises(TuneError, match="the configuration to compare with is wrong: 0, expected"):
        measurer.measure(FASTER, {"kind": "liar", "us": 0}, EFFORT, seed=3)


def test_a_slow_candidate_costs_the_fewest_pairs(measurer):
    slow = {"kind": "honest", "us": 160000}
    found = measurer.measure(slow, DEFAULT, Effort(2, 50, 60.0, stop_ratio=1.5), seed=3)
    assert found.status == "ok" and len(found.pairs) == 2


def test_nothing_prepared(tmp_path):
    with pytest.raises(TuneError, match="call prepare first"):
        Measurer(SubjectSpec("planted_subject:Planted", {}), LIMITS, tmp_path / "lock").measure(
            FASTER, DEFAULT, EFFORT, seed=0
        )


def test_a_subject_that_cannot_be_made(tmp_path):
    with Measurer(SubjectSpec("no_such_module:x", {}), LIMITS, tmp_path / "lock") as made:
        made.prepare({})
        with pytest.raises(TuneError, match=r"could not start: crashed, .*No module named 'no_such_module'"):
            made.measure(FASTER, DEFAULT, EFFORT, seed=0)
