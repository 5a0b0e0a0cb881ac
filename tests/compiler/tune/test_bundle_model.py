"""The bundle of a model by its sizes, from the command line; what is built is tested in test_bundle.py."""

import json
import math

import pytest
from typer.testing import CliRunner

from moec import cli
from moec.compiler.errors import CompileError
from moec.compiler.tune import bundle_model as module
from moec.compiler.tune.cuda_keys import gemm_key, gemm_problem
from moec.compiler.tune.database import Database
from moec.compiler.tune.errors import TuneError
from moec.compiler.tune.record import Record
from moec.compiler.tune.routing import UNIFORM, recorded, zipf

pytestmark = pytest.mark.null


@pytest.fixture
def asked(monkeypatch):
    """The requests that would be built."""
    requests = []

    def note(request, out, cache_dir, progress):
        requests.append(request)
        return {"candidates": {}, "problems": [], "rejected": []}

    monkeypatch.setattr(module, "write_bundle", note)
    return requests


def tune(*arguments):
    told = CliRunner().invoke(cli.app, ["tune", *map(str, arguments)])
    if told.exception is not None and not isinstance(told.exception, SystemExit):
        raise told.exception
    assert told.exit_code == 0, told.output
    return told.stdout


def test_the_layers_of_a_model(asked, tmp_path):
    db = tmp_path / "tuning.db"
    sizes = {"E": 64, "F": 1408, "H": 2048, "K": 6, "S": 2}
    config = {"kernel": "gemm_mma", "rows": 16, "columns": 128, "stages": 4, "warps_m": 1, "warps_n": 4, "splits": 1}
    key = gemm_key(gemm_problem(sizes, "gate_up"), sizes, 1, "unknown", "NVIDIA H200", "nvcc")
    with Database(db) as database:
        database.add(Record(key, config, "ok", reason="suggested"))
    arguments = ("zoo:deepseek-moe-16b", "--target", "cuda:sm_90a", "--bundle", tmp_path / "b", "--db", db)
    text = tune(*arguments, "--tokens", "1,64", "--zipf", "1", "--trials", "9")
    assert "run `python b/run.py` there, then `moec tune import b/results.jsonl" in text
    assert json.loads(tune(*arguments, "--json"))["bundle"] == str(tmp_path / "b")
    request = asked[0]
    (shape,) = request.shapes
    assert (shape.hidden, shape.inner, shape.num_experts, shape.top_k, shape.num_shared) == (2048, 1408, 64, 6, 2)
    assert (request.arch, request.tokens, request.routing.name, request.candidates) == ("sm_90a", (1, 64), "zipf-1", 9)
    assert request.suggestions == (config,)
    assert request.routing.mean_log_use(4) == pytest.approx([-math.log(i) for i in (1, 2, 3, 4)])


def test_what_cannot_be_bundled_is_refused(asked, tmp_path):
    ends = ("--db", tmp_path / "t.db", "--bundle", tmp_path / "b")
    for arguments, message in (
        (("zoo:mixtral-8x7b", *ends), "give --target cuda:sm_90a, not 'cpu'"),
        (("zoo:mixtral-8x7b", "--target", "cuda:sm_70", *ends), "'sm_70' is not supported"),
        (("zoo:nothing", "--target", "cuda:sm_90a", *ends), "no such zoo model"),
        (("zoo:mixtral-8x7b", "--import", "f", *ends), "give one of them"),
    ):
        with pytest.raises(CompileError, match=message):
            tune(*arguments)
    assert not asked


def test_the_use_of_experts():
    assert UNIFORM.mean_log_use(3) == [0, 0, 0]
    assert zipf(2.0).mean_log_use(2) == pytest.approx([0, -2 * math.log(2)])
    two_layers = recorded([[1, 3], [8, 0]], "trace-12345678")
    assert two_layers.mean_log_use(2) == pytest.approx([math.log(7 / 8), math.log(1 / 8)], rel=1e-4)
    with pytest.raises(TuneError, match="the trace has 2 experts in a layer, the model 4"):
        two_layers.mean_log_use(4)
