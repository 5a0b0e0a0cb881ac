"""Recorded routing: equal to a recount from transformers' router logits; the engine answers as it always does.

tests/test_tiny_moe.py counts again for the trained model.
"""

import json

import numpy as np
import pytest
import torch
from routing import recount
from typer.testing import CliRunner

from moec import cli
from moec.compiler.plan.inputs import PlanError, read_trace
from moec.runtime.errors import FormatError, InputError
from moec.runtime.recording import read_tokens, record_routing, run_sequences
from moec.runtime.routing import RoutingRecorder, bucket, read_routing, routing_text, write_routing

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def sequences():
    torch.manual_seed(1)
    return [torch.randint(1, 70, (n,)).tolist() for n in (40, 1, 17, 60, 33)]


def test_counts_equal_a_recount_from_router_logits(engine, model, sequences):
    with record_routing(engine) as recorder:
        run_sequences(engine, sequences, batch=2, max_new_tokens=0)
    routing = recorder.routing("mixtral")
    counts, pairs = recount(model, sequences, top_k=2)
    assert [r.layer for r in routing.layers] == engine.manifest["model"]["moe_layers"]
    assert routing.num_tokens == sum(map(len, sequences))
    for layer, theirs, both in zip(routing.layers, counts, pairs, strict=True):
        assert layer.top_k == 2 and layer.counts.tolist() == theirs.tolist()
        assert np.array_equal(layer.pairs, both.numpy())


def test_an_engine_that_is_recorded_answers_the_same(engine, sequences):
    own, expected = engine.executor, engine.generate(sequences[:2], 6)
    with record_routing(engine) as recorder:
        assert engine.generate(sequences[:2], 6) == expected
        assert torch.equal(engine(sequences[0]), own_logits(engine, own, sequences[0]))
    assert engine.executor is own
    # prefill of both, five decode steps of both (the last token is not fed again), then one sequence twice
    fed = sum(map(len, sequences[:2])) + 5 * 2 + len(sequences[0])
    assert {int(r.counts.sum()) for r in recorder.routing("x").layers} == {2 * fed}


def own_logits(engine, executor, tokens):
    recording, engine.executor = engine.executor, executor
    try:
        return engine(tokens)
    finally:
        engine.executor = recording


def test_the_loads_of_batches():
    recorder = RoutingRecorder([(3, 4)])
    recorder.add(0, torch.tensor([[0, 1], [0, 2], [0, 3]], dtype=torch.int32))  # 3 of 6 slots: 2 times the mean
    recorder.add(0, torch.tensor([[0, 1]] * 4, dtype=torch.int32))
    recorder.add(0, torch.tensor([[2, 3]], dtype=torch.int32))
    recorder.add(0, torch.empty((0, 2), dtype=torch.int32))
    (layer,) = recorder.routing("m").layers
    assert layer.counts.tolist() == [7, 5, 2, 2] and layer.pairs[0].tolist() == [7, 5, 1, 1]
    small, large = layer.loads
    assert (small.tokens, small.batches, small.active_mean) == (1, 1, 2.0)
    assert (large.tokens, large.batches, large.imbalance_mean, large.imbalance_max) == (4, 2, 2.0, 2.0)
    assert [bucket(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]


def test_the_file_comes_back_and_plan_reads_it(tmp_path):
    recorder = RoutingRecorder([(1, 6), (4, 6)])
    torch.manual_seed(0)
    for _ in range(3):
        for place in range(2):
            recorder.add(place, torch.rand(20, 6).topk(2).indices.int())
    routing, path = recorder.routing("mixtral"), tmp_path / "routing.json"
    write_routing(routing, path)
    again = read_routing(path)
    assert routing_text(again) == path.read_text() and again.name == routing.name
    assert [r.loads for r in again.layers] == [r.loads for r in routing.layers]
    for a, b in zip(again.layers, routing.layers, strict=True):
        assert np.array_equal(a.counts, b.counts) and np.array_equal(a.pairs, b.pairs)
    shape = _shape_of(num_layers=2, num_experts=6)
    assert read_trace(path, shape, 0.4).counts.tolist() == [r.counts.tolist() for r in routing.layers]
    data = json.loads(path.read_text())
    (tmp_path / "new.json").write_text(json.dumps(data | {"version": 2}))
    with pytest.raises(PlanError, match="version 2, this moec reads 1"):
        read_trace(tmp_path / "new.json", shape, 0.4)


def _shape_of(num_layers, num_experts):
    from moec.compiler.plan.config import shape_from_config

    config = {"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": num_layers}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "num_local_experts": num_experts}
    return shape_from_config(config | {"num_experts_per_tok": 2}, "small")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), r"no recorded routing \(format moec-routing\)"),
        (lambda d: d.update(version=9), "version 9, this moec reads 1; update moec"),
        (lambda d: d.pop("pairs"), "its parts do not fit together"),
        (lambda d: d["pairs"].append("eJwDAAAAAAE="), "its parts do not fit together"),
        (lambda d: d["pairs"].__setitem__(0, "????"), "its parts do not fit together"),
        (lambda d: d["counts"].__setitem__(0, [1, -2, 3]), "its parts do not fit together"),
        (lambda d: d["counts"].__setitem__(0, [1, 2]), "its parts do not fit together"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    recorder = RoutingRecorder([(0, 3)])
    recorder.add(0, torch.tensor([[0, 1], [1, 2]]))
    data = json.loads(routing_text(recorder.routing("m")))
    change(data)
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(FormatError, match=message):
        read_routing(tmp_path / "r.json")


def test_tokens_in_any_spelling(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("1,2, 3\n\n[4, 5]\n6 7\n")
    assert read_tokens(path) == [[1, 2, 3], [4, 5], [6, 7]]
    for text, message in (("1,x", "line 1: expected token ids"), ("[1.5]", "expected token ids"), ("\n", "no tokens")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_tokens(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_tokens(tmp_path / "absent")


def test_the_command(engine, engine_path, tmp_path, sequences):
    tokens, output = tmp_path / "tokens", tmp_path / "routing.json"
    tokens.write_text("\n".join(",".join(map(str, s)) for s in sequences))
    arguments = ["trace", str(engine_path), "--tokens-file", str(tokens), "-o", str(output)]
    told = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert told.exit_code == 0, told.output
    routing = read_routing(output)
    assert json.loads(told.stdout)["routing"] == routing.name and routing.num_tokens == sum(map(len, sequences))
    assert "busiest" in CliRunner().invoke(cli.app, [*arguments, "--max-new-tokens", "3"]).stdout
    assert read_routing(output).num_tokens == routing.num_tokens + 2 * len(sequences)


def test_what_cannot_be_recorded_is_refused(engine, monkeypatch):
    with record_routing(engine) as recorder:
        assert recorder.routing("m").num_tokens == 0
    for change, error, message in (
        ({"ranks": 2}, InputError, "one rank"),
        ({"model": {**engine.manifest["model"], "moe_layers": []}}, InputError, "no layer with experts"),
        ({"model": {**engine.manifest["model"], "top_k": 5}}, FormatError, "0 values that look like their choice"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(engine, "manifest", engine.manifest | change)
            with pytest.raises(error, match=message), record_routing(engine):
                pass
