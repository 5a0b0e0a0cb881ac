"""The command line on the model in examples/data: what it prints, and its one-line errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from moec import cli

MODEL = Path(__file__).parents[1] / "examples" / "data" / "tiny-moe"
pytestmark = pytest.mark.cpu


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs `moec ARGUMENTS` in this process -> exit code."""
    monkeypatch.setattr(sys, "argv", ["moec", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny.engine"
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, "compile", MODEL, "-o", path, "--layers", "2") == 0
    return path


def test_run_prints_tokens_and_text(engine, monkeypatch, capsys):
    arguments = ("run", engine, "--tokens", "5,6,7", "--max-new-tokens", "6", "--json")
    assert call(monkeypatch, *arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert len(first["tokens"]) == 6 and first["prefill_ms"] > 0 and first["decode_tokens_per_s"] > 0
    assert call(monkeypatch, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == first["tokens"]


def test_run_streams_the_prompt_and_what_follows(engine, monkeypatch, capsys):
    assert call(monkeypatch, "run", engine, "--prompt", "The assignment", "--max-new-tokens", "4") == 0
    assert capsys.readouterr().out.startswith("The assignment")


def test_sampling_follows_the_seed(engine, monkeypatch, capsys):
    def sample(seed: str) -> list[int]:
        options = ("--tokens", "5", "--temperature", "1.5", "--seed", seed, "--max-new-tokens", "12", "--json")
        assert call(monkeypatch, "run", engine, *options) == 0
        return json.loads(capsys.readouterr().out)["tokens"]

    assert sample("1") == sample("1") != sample("2")


def test_inspect_engine_has_the_documented_fields(engine, monkeypatch, capsys):
    assert call(monkeypatch, "inspect", engine, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    for field in (
        "model_type",
        "layers",
        "moe_layers",
        "experts",
        "top_k",
        "gate",
        "total_params",
        "target",
        "weights",
    ):
        assert field in report, field
    assert report["layers"] == 2 and report["experts"] == 16 and report["top_k"] == 2
    gates = report["ledger"]["fuse-gate"]
    assert gates["matched"] == gates["sites"] == 2
    assert all(e["max_rel_err"] <= e["tolerance"] for e in report["evidence"]) and report["evidence"]
    assert all(k["kernel"] for k in report["kernels"]) and report["kernels"]


def test_inspect_prints_tables(engine, monkeypatch, capsys):
    assert call(monkeypatch, "inspect", engine) == 0
    shown = capsys.readouterr().out
    assert "match ledger" in shown and "GB" in shown


def test_facts_are_told_in_short():
    ranks = {"strategy": "TP2xPP2", "mesh": "cpux4", "ranks": [{}] * 4, "stages": 2, "lanes": 1, "copies": {}}
    assert cli._told("placement", ranks) == "TP2xPP2 on cpux4: 4 ranks, 2 stages, 1 lanes"
    assert cli._told("weight_bytes", {"int4": 10_600_000_000, "bf16": 32_800_000_000}) == "bf16 32.8 GB, int4 10.6 GB"
    assert cli._told("total_params", 16_375_728_128) == "16,375,728,128" and cli._told("placement", None) == "None"


def test_verify_notices_a_changed_byte(engine, monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "verify", engine) == 0
    copy = tmp_path / "copy.engine"
    copy.mkdir()
    for file in engine.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    damaged = bytearray((copy / "weights-0.safetensors").read_bytes())
    damaged[-1] ^= 1
    (copy / "weights-0.safetensors").write_bytes(damaged)
    capsys.readouterr()
    assert call(monkeypatch, "verify", copy) == 1
    message = capsys.readouterr().err
    assert "weights-0.safetensors" in message and message.count("\n") == 1


def test_bench_rows(engine, monkeypatch, capsys):
    assert call(monkeypatch, "bench", engine, "--batch", "1,2", "--prompt-len", "4", "--gen-len", "3", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["batch"], r["prompt_len"]) for r in rows] == [(1, 4), (2, 4)]
    assert all(r["decode_tokens_per_s"] > 0 and r["prefill_tokens_per_s"] > 0 and r["peak_rss_bytes"] > 0 for r in rows)


def test_doctor_reports_this_machine(monkeypatch, capsys):
    assert call(monkeypatch, "doctor", "--json") == 0
    topics = {f["topic"]: f for f in json.loads(capsys.readouterr().out)}
    assert topics["apache-tvm"]["state"] == topics["kernels"]["state"] == topics["linker"]["state"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "{engine}"), "exactly one of --tokens and --prompt"),
        (("run", "{engine}", "--tokens", "a,b"), "comma-separated integers"),
        (("run", "{engine}", "--tokens", ""), "empty"),
        (("run", "{engine}", "--tokens", "99999"), "99999"),
        (("run", "{engine}", "--tokens", "1", "--max-new-tokens", "100000"), "context"),
        (("run", "{tmp}/none"), "exactly one"),
        (("bench", "{engine}", "--batch", "1,x"), "--batch: expected comma-separated integers, got '1,x'"),
        (("run", "{tmp}/none", "--tokens", "1"), "no such engine"),
        (("compile", "{tmp}", "-o", "{tmp}/e"), "config.json"),
        (("compile", "{tmp}/none", "-o", "{tmp}/e"), "none"),
        (("compile", str(MODEL), "-o", "{engine}"), "exists"),
        (("compile", str(MODEL), "-o", "{tmp}/e", "--target", "z80"), "z80"),
        (("compile", str(MODEL), "-o", "{tmp}/e", "--weights", "f7"), "f7"),
        (("compile", str(MODEL), "-o", "{tmp}/e", "--strategy", "TP2"), "give --devices or --mesh as well"),
    ],
)
def test_bad_input_is_one_line(arguments, expected, engine, tmp_path, monkeypatch, capsys):
    filled = [a.format(engine=engine, tmp=tmp_path) for a in arguments]
    assert call(monkeypatch, *filled) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and expected in message
    assert message.count("\n") == 1, message
    assert not (tmp_path / "e").exists()
