"""A search over planted candidates: it ends, the faults never win, ties go to the canonical choice, and it resumes."""

from pathlib import Path

import pytest

from moec.compiler.tune.database import Database
from moec.compiler.tune.errors import TuneError
from moec.compiler.tune.measure import Effort, Limits, Measurement, Measurer
from moec.compiler.tune.record import Key, config_hash
from moec.compiler.tune.search import Search, Settings
from moec.compiler.tune.space import Branch, Space
from moec.compiler.tune.subject import SubjectSpec

SUPPORT = Path(__file__).parents[2] / "support"
KEY = Key("0" * 64, "experts", "E=8", 4, "bfloat16", "uniform", "cpu:x:y:x1", "tvm-0")
SPACE = Space((Branch({"kernel": "a", "speed": 8, "width": 4}, {"speed": (1, 2, 4, 8, 16), "width": (2, 4, 8)}),))


class Fake:
    """A measurer whose times are a function of the configuration; what was asked of it is kept."""

    def __init__(self, us, broken=()):
        self.us, self.broken, self.asked = us, broken, []

    def prepare(self, task):
        self.task = task

    def measure(self, config, against, effort, seed):
        self.asked.append(config)
        if config_hash(config) in self.broken:
            return Measurement("crashed", "signal SIGSEGV")
        pairs = tuple((self.us(config) * (1 + n / 1000), self.us(against) * (1 + n / 1000)) for n in range(9))
        return Measurement("ok", "", pairs)


def _search(tmp_path, measurer, space=SPACE, **settings):
    database = Database(tmp_path / "t.db")
    return Search(KEY, space, database, measurer, Settings(**settings), "w"), database


def _speed(config):
    return 100.0 + 10 * config["speed"]


def test_small_space_is_searched_whole_and_the_best_wins(tmp_path):
    fake = Fake(_speed)
    search, database = _search(tmp_path, fake, trials=20)
    outcome = search.run({})
    assert outcome.tried == SPACE.size - 1
    assert outcome.winner.config == {"kernel": "a", "speed": 1, "width": 4}
    assert database.winner(KEY).config == outcome.winner.config and database.winner(KEY).ratio_high < 1


def test_a_large_space_is_searched_by_the_model(tmp_path):
    """1,400 candidates, 24 trials: the model finds what is within 6 % of the best, for every seed."""
    values = {
        "a": (1, 2, 4, 8, 16),
        "b": (1, 2, 4, 8, 16, 32, 64),
        "c": (0, 1),
        "d": (1, 2, 4, 8, 16),
        "e": (1, 2, 4, 8),
    }
    space = Space((Branch({"kernel": "k", "a": 4, "b": 8, "c": 0, "d": 4, "e": 2}, values),))

    def us(c):
        return 100 * (1 + 0.1 * abs(c["a"].bit_length() - 5) + 0.05 * abs(c["b"].bit_length() - 2) + 0.1 * c["c"])

    best = min(us(c) for c in space.all())
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        outcome = _search(folder, Fake(us), space, trials=24, seed=seed)[0].run({})
        assert outcome.tried == 24 and us(outcome.winner.config) <= 1.06 * best


def test_ties_go_to_the_default_and_to_the_fewest_changes(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert _search(tmp_path / "a", Fake(lambda c: 100.0), trials=20)[0].run({}).winner.is_default
    fast = _search(tmp_path / "b", Fake(lambda c: 50.0 + 0.1 * c["width"] if c["speed"] == 1 else 100.0), trials=20)
    assert fast[0].run({}).winner.config == {"kernel": "a", "speed": 1, "width": 4}  # width=2 is 0.4 % faster


def test_what_crashes_never_wins(tmp_path):
    best = {"kernel": "a", "speed": 1, "width": 4}
    outcome = _search(tmp_path, Fake(_speed, broken=[config_hash(best)]), trials=20)[0].run({})
    assert outcome.failed == 1 and outcome.winner.config["speed"] == 1 and outcome.winner.config != best


def test_a_default_that_fails_ends_the_search(tmp_path):
    with pytest.raises(TuneError, match="the default of E=8 at T=4: crashed, signal SIGSEGV"):
        _search(tmp_path, Fake(_speed, broken=[config_hash(SPACE.default)]), trials=5)[0].run({})


def test_resuming_measures_nothing_twice(tmp_path):
    """A run that ends after 6 candidates, then one that goes on: no screening is repeated."""
    first = Fake(_speed)
    search, database = _search(tmp_path, first, trials=5)
    search.run({})
    again = Fake(_speed)
    outcome = Search(KEY, SPACE, database, again, Settings(trials=20), "w").run({})
    screened = [config_hash(c) for c in first.asked[:6]]
    fresh = [config_hash(c) for c in again.asked[: SPACE.size - 6]]
    assert not set(screened) & set(fresh) and len(set(fresh)) == SPACE.size - 6
    assert outcome.known == 6 and outcome.winner.config == {"kernel": "a", "speed": 1, "width": 4}


def test_planted_candidates_in_real_processes_never_win(tmp_path, monkeypatch):
    """All that would be fastest misbehave; the honest one that is a little faster than the default wins."""
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    kinds = ("honest", "crash", "leave", "liar", "late liar", "vandal", "leak", "hang")
    values = {"kind": kinds, "us": (2000, 40000)}
    space = Space((Branch({"kernel": "p", "kind": "honest", "us": 40000}, values),))
    limits = Limits(setup_s=60, check_s=2.5, time_s=20, memory_bytes=256 << 20)
    log = tmp_path / "built"
    spec = SubjectSpec("planted_subject:Planted", {"log": str(log)})
    quick = Effort(6, 7, 5.0)
    with Measurer(spec, limits, tmp_path / "lock") as measurer, Database(tmp_path / "t.db") as database:
        settings = Settings(trials=20, screen=quick, confirm=quick)
        outcome = Search(KEY, space, database, measurer, settings, "w").run({})
        assert outcome.winner.config == {"kernel": "p", "kind": "honest", "us": 2000}
        states = {r.config["kind"]: r.status for r in database.records(KEY) if r.config["us"] == 2000}
    assert states == {
        "honest": "ok", "crash": "crashed", "leave": "crashed", "liar": "wrong", "late liar": "wrong",
        "vandal": "wrong", "leak": "memory", "hang": "timeout",
    }  # fmt: skip
    assert log.read_text().count("hang 2000") == 1
