"""moec.tune and its command: which layers are found, what is refused, how a run resumes and is shown."""

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import moec
from moec.cli import app
from moec.compiler.kernels.spec import ExpertsProblem
from moec.compiler.tune import api
from moec.compiler.tune.database import Database
from moec.compiler.tune.errors import TuneError
from moec.compiler.tune.measure import Measurement
from moec.compiler.tune.routing import UNIFORM
from moec.compiler.tune.search import Settings
from moec.runtime.errors import EngineError

pytestmark = pytest.mark.cpu

TINY = Path(__file__).parents[3] / "examples" / "data" / "tiny-moe"
SMALL, OTHER = ExpertsProblem(64, 64, 8, 2), ExpertsProblem(96, 64, 8, 2)


class FakeMeasurer:
    """Stands for the measuring process: candidates with other gate_up tasks take half the time."""

    made = 0

    def __init__(self, subject, limits):
        FakeMeasurer.made += 1
        assert subject.factory == api.FACTORY and subject.arguments["level"] == "avx2"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def prepare(self, task):
        self.task = task

    def measure(self, config, against, effort, seed):
        took = 0.5 if config.get("task_bytes") != against.get("task_bytes") else 1.0
        return Measurement("ok", "", ((took * 1e-3, 1e-3),) * 9)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(api, "Measurer", FakeMeasurer)
    FakeMeasurer.made = 0
    return FakeMeasurer


def _jobs(*problems, tokens=(1, 64)):
    return api.jobs_of(problems, "avx2", UNIFORM, tokens, 0)


def test_every_layer_and_count_has_an_outcome(fake, tmp_path):
    jobs = _jobs(SMALL, OTHER)
    for workers, name in ((1, "a"), (2, "b")):
        outcomes = api.run_jobs(jobs, tmp_path, tmp_path / f"{name}.db", Settings(trials=5), workers=workers)
        assert [o.key for o in outcomes] == [j.key for j in jobs]
        assert all(o.winner.is_winner for o in outcomes)
        with Database(tmp_path / f"{name}.db") as database:
            keys = database.keys()
        assert {k.tokens for k in keys} == {1, 64} and len(keys) == 4
    assert fake.made == 4, "one process for each layer"


def test_results_are_not_mixed_with_earlier_ones_unless_asked(fake, tmp_path):
    db = tmp_path / "t.db"
    first = api.run_jobs(_jobs(SMALL), tmp_path, db, Settings(trials=3))
    with pytest.raises(TuneError, match="holds results of 2 of the 4 problems; --resume continues"):
        api.run_jobs(_jobs(SMALL, OTHER), tmp_path, db, Settings(trials=3))
    seen = []
    again = api.run_jobs(_jobs(SMALL, OTHER), tmp_path, db, Settings(trials=3), resume=True, show=seen.append)
    assert [o.winner for o in again[:2]] == [o.winner for o in first]
    assert {e.key for e in seen if e.kind == "measured"} == {j.key for j in _jobs(OTHER)}


def test_an_error_of_one_worker_ends_the_run(fake, tmp_path, monkeypatch):
    def broken(self, task):
        raise TuneError("no memory")

    monkeypatch.setattr(FakeMeasurer, "prepare", broken)
    with pytest.raises(TuneError, match="no memory"):
        api.run_jobs(_jobs(SMALL, OTHER), tmp_path, tmp_path / "t.db", Settings(trials=3), workers=2)


def test_what_cannot_be_tuned(tmp_path):
    with pytest.raises(TuneError, match="token counts are 1 or more, got 0,4"):
        _jobs(SMALL, tokens=(0, 4))
    with pytest.raises(TuneError, match="for a GPU use --bundle"):
        moec.tune(str(TINY), target="cuda:sm_90a", db=tmp_path / "t.db", layers=1)


def test_the_command_finds_the_layer_of_the_tiny_model(fake, tmp_path):
    """Five equal layers are one problem; no weight is read, so the checkpoint's files need not be there."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((TINY / "config.json").read_text())
    db = tmp_path / "t.db"
    options = ["--target", "cpu:avx2", "--tokens", "1,64", "--trials", "4", "--random-weights", "0", "--layers", "1"]
    result = CliRunner().invoke(app, ["tune", str(folder), "--db", str(db), *options, "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [r["winner"]["key"]["tokens"] for r in rows] == [1, 64]
    assert {r["winner"]["key"]["routing"] for r in rows} == {"zipf-0.4"} and rows[0]["tried"] == 4


def test_bad_options_are_one_line(tmp_path):
    result = CliRunner().invoke(app, ["tune", str(TINY), "--db", str(tmp_path / "t.db"), "--tokens", "1,x"])
    assert isinstance(result.exception, EngineError)
    assert str(result.exception) == "--tokens: expected comma-separated integers, got '1,x'"


def test_the_problems_of_ranks_are_their_slices():
    """Half of every expert's inner width under TP2; under EP2 no rank has a whole layer."""
    sliced = api.TunedModel(str(TINY), "cpu:avx2", layers=1, ranks=moec.RankOptions(devices=2, strategy="TP2"))
    plan = api.plan_of(sliced, UNIFORM, (1,))
    assert [(job.problem.inner, job.problem.num_experts) for job in plan.jobs] == [(32, 16)] and plan.sites == 2
    with pytest.raises(TuneError, match="each rank has some of the experts"):
        api.plan_of(dataclasses.replace(sliced, ranks=moec.RankOptions(devices=2, strategy="EP2")), UNIFORM, (1,))
