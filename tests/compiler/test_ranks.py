"""Engines for several ranks: what is written, and that the programs together compute what the model computes."""

from __future__ import annotations

import json

import pytest
import torch
from run_ranks import run_engine
from transformers import MixtralConfig, MixtralForCausalLM

from moec.compiler.errors import CompileError
from moec.compiler.ranks import RankOptions, compile_ranks
from moec.passes.placement.verify import verify_plan
from moec.runtime.loader import map_weights

TOLERANCE = 1e-5  # of the greatest logit: f32 sums in another order, measured 2e-7 to 4e-7
PROMPTS = [[5, 9, 2, 77], [11], [3, 3, 3], [130, 0], [7, 8], [1, 2, 3, 4, 5]]


@pytest.fixture(scope="module")
def model():
    """6 heads, 5 experts, 3 layers and 131 words: nothing divides by 4."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=48, intermediate_size=48, num_hidden_layers=3, num_attention_heads=6, vocab_size=131
    )
    config.num_key_value_heads, config.num_local_experts = 6, 5
    return MixtralForCausalLM(config).eval()


def compiled(model, folder, strategy, devices, chunks=1, target="cpu"):
    manifest = compile_ranks(
        model, folder / "engine", RankOptions(devices=devices, strategy=strategy, chunks=chunks), target=target
    )
    return folder / "engine", manifest


def library_only(monkeypatch) -> None:
    """No kernels of our own, so that programs run without a kernel library."""
    monkeypatch.setattr("moec.compiler.options._level", lambda target: None)


@pytest.mark.parametrize(
    ("strategy", "devices", "chunks"),
    [("TP4", 4, 1), ("EP4", 4, 1), ("DP2TP2-EP4+1", 4, 2), ("DP2-EP2xPP2xR2", 8, 1)],
)
def test_programs_together_compute_the_model(model, tmp_path, monkeypatch, strategy, devices, chunks):
    library_only(monkeypatch)
    folder, manifest = compiled(model, tmp_path, strategy, devices, chunks)
    where = manifest["placement"]
    count = where["lanes"] * where["replicas"]
    lanes = [PROMPTS[i::count] for i in range(count)]
    if count > 1:
        lanes[-1] = []  # a lane without tokens takes part in every exchange
    for entry, logits in zip(where["ranks"], run_engine(folder, lanes), strict=True):
        prompts = lanes[entry["replica"] * where["lanes"] + entry["lane"]]
        assert entry["gives_logits"] == (entry["stage"] == where["stages"] - 1)
        if not entry["gives_logits"]:
            continue
        expected = [model(torch.tensor([p])).logits[0] for p in prompts]
        assert logits.shape == (sum(map(len, prompts)), 131)
        for got, want in zip(logits.split([len(p) for p in prompts]), expected, strict=True):
            assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


def test_what_is_written(model, tmp_path, monkeypatch):
    """One program a rank, one weights file a rank of a replica, the plan, and what ranks must agree on."""
    library_only(monkeypatch)
    folder, manifest = compiled(model, tmp_path, "EP2xR2", 4)
    where = manifest["placement"]
    assert manifest["ranks"] == 4 and len(json.loads((folder / "program.json").read_text())["ranks"]) == 4
    assert [e["weights"] for e in where["ranks"]] == ["weights-0.safetensors", "weights-1.safetensors"] * 2
    assert sorted(p.name for p in folder.glob("weights*")) == ["weights-0.safetensors", "weights-1.safetensors"]
    assert [e["groups"] for e in where["ranks"]] == [{"stage-0": [0, 1]}] * 2 + [{"stage-0": [2, 3]}] * 2
    assert len(where["order_sha256"]) == 64
    assert verify_plan(json.loads((folder / "plan.json").read_text())) == []
    evidence = [e for e in json.loads((folder / "evidence.json").read_text()) if e["pass"] == "place"]
    assert len(evidence) == 3 and all(e["max_rel_err"] <= e["tolerance"] for e in evidence)
    assert "shard-weights" in json.loads((folder / "ledger.json").read_text())
    held = [sum(t.numel() for t in map_weights(folder / f"weights-{r}.safetensors").values()) for r in (0, 1)]
    whole = sum(p.numel() for p in model.parameters())
    assert max(held) < 0.65 * whole  # two ranks: half of all, and what every rank holds


def test_a_budget_reaches_every_rank(model, tmp_path, monkeypatch):
    """Formats are chosen once: the ranks of a group store the parts of an expert alike, and all keep to the size."""
    library_only(monkeypatch)
    options = RankOptions(devices=2, strategy="TP2")
    manifest = compile_ranks(model, tmp_path / "engine", options, weights="auto:7bits", verify="off")
    stored = manifest["model"]["stored_bytes"]
    quantised = {name: size for name, size in stored.items() if name != "float32"}
    assert len(quantised) > 1 and all(name.startswith(("int", "ternary")) for name in quantised)
    values = 3 * 5 * 3 * 48 * 48  # layers, experts, matrices of 48 x 48
    assert sum(quantised.values()) <= values  # 7 bits, and a scale for each row of a part
    programs = json.loads((tmp_path / "engine" / "program.json").read_text())["ranks"]
    kept = [[s["kwargs"]["gate_up"] for s in p["steps"] if s["name"] == "stored_experts"] for p in programs]
    assert len(kept[0]) == 3 and kept[0] == kept[1]
    assert json.loads((tmp_path / "engine" / "plan.json").read_text())["weights"]["name"] == "int8-experts"


def test_a_format_that_does_not_fit_is_the_callers_mistake(model, tmp_path):
    """Two ranks share the columns of every expert: 16 or 32 of 48, which no group of 64 divides."""
    options = RankOptions(devices=2, strategy="TP2")
    with pytest.raises(CompileError, match="weights cannot be stored as asked"):
        compile_ranks(model, tmp_path / "engine", options, weights="int4-g64", verify="off")


def test_experts_are_placed_by_a_trace(model, tmp_path, monkeypatch):
    """Two experts get nearly all tokens: they lie on two ranks, whichever they are."""
    library_only(monkeypatch)
    for busy in ((0, 1), (3, 4)):
        trace = tmp_path / f"{busy[0]}.json"
        trace.write_text(json.dumps({"counts": [[1000 if e in busy else 1 for e in range(5)]] * 3}))
        folder = tmp_path / f"engine-{busy[0]}"
        compile_ranks(model, folder, RankOptions(devices=2, strategy="EP2", trace=trace), verify="off")
        document = json.loads((folder / "plan.json").read_text())
        assert document["routing"]["counts"][0][busy[0]] == 1000
        for layer in document["layers"]:
            where = {expert: group for expert, group, _ in layer["resident"]}
            assert where[busy[0]] != where[busy[1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RankOptions(devices=2, trace="nowhere.json"), "there is no trace nowhere.json"),
        (RankOptions(devices=2, capacity=0.0), "capacity 0.0: expected a factor above 0"),
        (RankOptions(devices=2, capacity=1.0, capacity_per="layer"), "capacity per 'layer'; expected device or expert"),
        (RankOptions(), "give one of devices"),
        (RankOptions(devices=2, mesh="h100x2"), "give one of devices"),
        (RankOptions(devices=0), "devices is 0"),
        (RankOptions(devices=2, strategy="TP3"), "needs 3 devices, mesh cpux2 has 2"),
        (RankOptions(mesh="nosuch.json"), "cannot be read"),
    ],
)
def test_bad_options(model, tmp_path, options, message):
    with pytest.raises(CompileError, match=message):
        compile_ranks(model, tmp_path / "engine", options)


def test_packed_numbers_are_for_one_rank(model, tmp_path):
    with pytest.raises(CompileError, match="bf16-packed is for engines of one rank; choose experts=bf16"):
        compile_ranks(model, tmp_path / "engine", RankOptions(devices=2, strategy="EP2"), weights="bf16-packed")


def test_plain_modules_are_refused(tmp_path):
    with pytest.raises(CompileError, match=r"."):
        compile_ranks(torch.nn.Linear(4, 4), tmp_path / "engine", RankOptions(devices=2))
