"""An engine compiled with a tuning database: what it says of each range of T, and that its results stay the same."""

import dataclasses
from pathlib import Path

import pytest
import torch

import moec
from moec.compiler.api import capture_as, lowered_of
from moec.compiler.kernels.spec import ExpertsProblem
from moec.compiler.lowering.tuned import tuning_ledger
from moec.compiler.options import CompileOptions
from moec.compiler.tune.database import Database
from moec.compiler.tune.environment import experts_key
from moec.compiler.tune.errors import DatabaseError
from moec.compiler.tune.lookup import DatabaseTuning
from moec.compiler.tune.record import Record
from moec.compiler.tune.space import experts_space
from moec.runtime.format import LEDGER, TUNING, read_json

pytestmark = pytest.mark.cpu

TINY = Path(__file__).parents[3] / "examples" / "data" / "tiny-moe"
LEVEL = "avx2"
LAYER = ExpertsProblem(192, 64, 16, 2)
KERNEL = "experts-avx2"


def _database(path, tokens=(4, 64), routing="zipf-0.4", layer=LAYER, **changes):
    """Winners with another down_panels at each token count, 0.8 of the default's time; at 1 token the default won."""
    with Database(path) as database:
        for count in (1, *tokens):
            space = experts_space(layer, LEVEL, count)
            key = dataclasses.replace(experts_key(layer, LEVEL, count, routing), **changes)
            default = Record(key, space.default, "ok", "", 100.0, 1.0, 0.99, 1.01, 9, is_default=True)
            database.add(default)
            config = space.default | {"down_panels": 1 if count <= 16 else 4}
            winner = Record(key, config, "ok", "", 80.0, 0.8, 0.79, 0.81, 9)
            database.set_winner(key, default if count == 1 else winner)
    return path


def test_measured_counts_are_measured_and_the_rest_is_predicted(tmp_path):
    ranges = DatabaseTuning(_database(tmp_path / "t.db"), LEVEL).ranges(LAYER, KERNEL)
    by_end = {r.max_tokens: r for r in ranges}
    assert by_end[1].source == "default" and "nothing was faster" in by_end[1].why and by_end[1].measured_us == 100
    assert by_end[4].source == "measured" and by_end[4].config["down_panels"] == 1
    assert "0.800 of the default's time, at most 0.810 (95 %), 9 pairs" in by_end[4].why
    assert by_end[64].config["down_panels"] == 4 and by_end[64].expected_loss is None
    assert all(r.expected_loss is not None for end, r in by_end.items() if end not in (1, 4, 64))
    assert ranges[-1].max_tokens is None and by_end[8].source in ("predicted", "default")


def test_the_reason_why_a_database_does_not_fit(tmp_path):
    strange = {"toolchain": "tvm-0", "kernel_sha256": "0" * 64, "device": "cpu:amx_bf16:x:x1", "weight_format": "int4"}
    for name, value in strange.items():
        path = _database(tmp_path / f"{name}.db", **{name: value})
        told = DatabaseTuning(path, LEVEL).ranges(LAYER, KERNEL)
        assert isinstance(told, str) and f"measured this layer with {name} {value[:40]}" in told
    other = dataclasses.replace(LAYER, hidden=64)
    assert "has no measurement of experts" in DatabaseTuning(path, LEVEL).ranges(other, KERNEL)
    with pytest.raises(DatabaseError, match="there is no tuning database"):
        DatabaseTuning(tmp_path / "none.db", LEVEL)


def test_an_engine_says_what_it_uses_and_gives_the_same_results(tmp_path):
    """Few tokens take the default, 2 to 4 one variant, more another: all give what the untuned engine gives.

    The variants differ in which thread does what, not in the order of sums: the results are equal bit for bit.
    """
    options = {"layers": 1, "target": "cpu:avx2", "verify": "off"}
    plain = moec.compile(str(TINY), **options)
    database = _database(tmp_path / "t.db")
    tuned = moec.compile(str(TINY), tune_db=database, **options, output=tmp_path / "tuned")
    for count in (1, 3, 40):
        tokens = torch.arange(count) % 100 + 1
        assert torch.equal(plain(tokens), tuned(tokens)), f"{count} tokens"
    record = next(k for k in read_json(tmp_path / "tuned" / TUNING)["kernels"] if k["kernel"] == KERNEL)
    assert {"measured", "default"} <= {t["source"] for t in record["tuned"]} and record["measured_us"] == 100.0
    assert len(record["variants"]) >= 3 and record["variants"][0]["max_tokens"] == 1
    assert read_json(tmp_path / "tuned" / LEDGER)["tune-kernels"]["matched"] == 1
    weights = [(f / "weights-0.safetensors").stat().st_size for f in (plain.directory, tmp_path / "tuned")]
    assert weights[0] == weights[1], "no weight is stored twice"


def test_without_a_fitting_measurement_the_default_is_used_and_the_ledger_says_so(tmp_path):
    options = CompileOptions.of("cpu:avx2", None, "off", None, _database(tmp_path / "t.db", toolchain="tvm-0"))
    captured = capture_as(str(TINY), None, 1, None, options)
    _, _, lowered = lowered_of(captured, options, lambda stage, done, total: None)
    (choice,) = [c for c in lowered.choices if c.site.problem is not None]
    assert len(choice.variants) == 1 and choice.record()["untuned"] == choice.untuned
    ledger = tuning_ledger([(choice.site, choice.tuned, choice.untuned)])
    assert not ledger.matched and "toolchain tvm-0" in ledger.refused[0].reason


def test_ranks_take_what_was_measured_of_their_slices(tmp_path):
    """TP2 halves the inner width of every expert; a rank of EP2 has half of the experts: that is not measured."""
    database = _database(tmp_path / "t.db", layer=dataclasses.replace(LAYER, inner=LAYER.inner // 2))
    options = {"layers": 1, "target": "cpu:avx2", "verify": "off", "tune_db": database}
    for strategy in ("TP2", "EP2"):
        moec.compile_ranks(str(TINY), tmp_path / strategy, moec.RankOptions(devices=2, strategy=strategy), **options)
    tuned = [k for k in read_json(tmp_path / "TP2" / TUNING)["kernels"] if k["kernel"] == KERNEL]
    assert [k["rank"] for k in tuned] == [0, 1]
    for one in tuned:
        by_end = {r["max_tokens"]: r for r in one["tuned"]}
        assert by_end[4]["source"] == "measured" and by_end[4]["config"]["down_panels"] == 1
    assert read_json(tmp_path / "TP2" / LEDGER)["tune-kernels"]["matched"]
    ledger = read_json(tmp_path / "EP2" / LEDGER)["tune-kernels"]
    assert not ledger["matched"] and "8 of 16 experts are here" in ledger["refused"][0]["reason"]
