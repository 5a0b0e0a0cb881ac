"""Models with blocks of plain Python: captured, compiled and compared with themselves."""

import json

import moe_blocks
import pytest
import torch
from torch import nn

import moec
from moec.compiler.capture import capture
from moec.compiler.errors import UnsupportedModel
from moec.passes.ir.evaluate import evaluate

pytestmark = pytest.mark.null


class Layer(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(moe_blocks.H), block

    def forward(self, x):
        y = self.mlp(self.norm(x))
        return x + (y if isinstance(y, torch.Tensor) else y[0])


class Model(nn.Module):
    """Two layers of one class of block, and an ordinary MLP between embedding and head."""

    def __init__(self, make):
        super().__init__()
        hidden = moe_blocks.H
        self.embed = nn.Embedding(50, hidden)
        self.dense = nn.Sequential(nn.Linear(hidden, 60), nn.GELU(), nn.Linear(60, hidden))
        self.layers = nn.ModuleList(Layer(make()) for _ in range(2))
        self.head = nn.Linear(hidden, 50)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.dense(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def model_of(make):
    torch.manual_seed(3)
    return Model(make).eval()


def tokens(*shape, seed=0):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", [moe_blocks.MixtralLoop, moe_blocks.NumpyRouter])
def test_captured_graph_is_the_model(make):
    model = model_of(make)
    captured = capture(model, (tokens(2, 5),))
    assert [c["site"] for c in captured.certificates] == ["layers.0.mlp", "layers.1.mlp"]
    experts = [n for n in captured.graph_module.graph.nodes if n.target is torch.ops.moec.experts.default]
    assert len(experts) == 2 and captured.moe_layers == (0, 1)
    for shape in ((3, 7), (1, 1), (2, 9)):
        ids = tokens(*shape, seed=1)
        with torch.no_grad():
            expected = model(ids)
        found = evaluate(captured.graph_module, [ids], captured.read)
        assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


def test_blocks_of_one_kind_are_lifted_once_and_compared():
    captured = capture(model_of(moe_blocks.MixtralLoop), (tokens(2, 5),))
    first, second = captured.certificates
    assert first["certificate"]["runs"] > 50
    assert second["certificate"] == {"same_as": "MixtralLoop"}
    assert all(c["max_rel_err"] <= c["tolerance"] for c in captured.certificates)


def test_the_users_model_is_left_alone():
    model = model_of(moe_blocks.MixtralLoop)
    before = list(model.named_modules())
    capture(model, (tokens(2, 5),))
    assert [(n, id(m)) for n, m in model.named_modules()] == [(n, id(m)) for n, m in before]


def test_a_refused_block_is_named_in_the_error():
    class Counting(moe_blocks.MixtralLoop):
        def forward(self, h):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(h * (1 + 0.1 * (self.calls > 3)))[0]

    with pytest.raises(UnsupportedModel, match=r"layers.0.mlp was not lifted \(state: a call changes calls"):
        capture(model_of(Counting), (tokens(2, 5),))


def test_compiled_model_agrees_and_keeps_the_certificates(tmp_path):
    model = model_of(moe_blocks.MixtralLoop)
    engine = moec.compile(model, (tokens(2, 5),), output=tmp_path / "engine")
    for shape in ((3, 7), (1, 1)):
        ids = tokens(*shape, seed=2)
        with torch.no_grad():
            expected = model(ids)
        assert (engine(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    records = json.loads((tmp_path / "engine" / "evidence.json").read_text())
    lifted = [r for r in records if r["pass"] == "lift-block"]
    assert [r["layer"] for r in lifted] == [0, 1] and lifted[0]["certificate"]["num_experts"] == 8
    assert engine.verify()["passed"]
