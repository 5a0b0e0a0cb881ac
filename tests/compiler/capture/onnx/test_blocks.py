"""Files with experts spelled out, as exporters write them: one gate, one experts node, ONNX Runtime's numbers.

Unrolled files are torch's classic exporter's, of modules in the style that older transformers had (a loop over experts
with NonZero, Gather and ScatterElements for each); transformers' own modules of today export as batched products.
"""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx_files as files
import pytest
import torch
from moe_blocks import DbrxFlat, GptOss, H, Llama4, MixtralLoop, SparseMixer, glu
from onnx import helper
from torch import nn
from torch.nn import functional as F

import moec
import moec.compiler.errors
from moec.compiler.capture import capture
from moec.passes.ir.evaluate import evaluate

TOLERANCE = 1e-5  # relative, float32: sums over experts in another order; measured 1e-7 to 3e-7


class Loop(nn.Module):
    """Experts in a loop over all, each on the rows that chose it."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.gate = nn.Linear(H, num_experts, bias=False)
        self.experts = nn.ModuleList(glu() for _ in range(num_experts))

    def looped(self, x, weights, chosen):
        y = torch.zeros_like(x)
        mask = F.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            k, t = torch.where(mask[e])
            y.index_add_(0, t, self.experts[e](x[t]) * weights[t, k, None])
        return y


class Qwen2(Loop):
    """Softmax over all without renormalising, and a shared expert behind a sigmoid."""

    def __init__(self) -> None:
        super().__init__(6, 2)
        self.shared, self.shared_gate = glu(), nn.Linear(H, 1, bias=False)

    def forward(self, h):
        x = h.reshape(-1, H)
        weights, chosen = torch.topk(F.softmax(self.gate(x), dim=1), self.top_k, dim=-1)
        y = self.looped(x, weights, chosen) + torch.sigmoid(self.shared_gate(x)) * self.shared(x)
        return y.reshape(h.shape)


class DeepseekV3(Loop):
    """Sigmoid with a correction bias, groups by the sum of their two best, scaled."""

    def __init__(self) -> None:
        super().__init__(8, 2)
        self.register_buffer("bias", torch.randn(8) * 0.1)

    def forward(self, h):
        x = h.reshape(-1, H)
        scores = self.gate(x).sigmoid()
        choice = scores + self.bias
        best = choice.view(-1, 4, 2).topk(2, dim=-1)[0].sum(-1)
        kept = torch.zeros_like(best).scatter(1, torch.topk(best, 2, dim=-1)[1], 1.0)
        kept = kept.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8)
        chosen = torch.topk(choice.masked_fill(kept == 0, float("-inf")), self.top_k, dim=-1)[1]
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5
        return self.looped(x, weights, chosen).reshape(h.shape)


UNROLLED = {
    "mixtral": lambda: MixtralLoop(E=4),
    "qwen2_moe": Qwen2,
    "deepseek_v3": DeepseekV3,
    "phimoe": lambda: SparseMixer(E=4),
    "dbrx": lambda: DbrxFlat(E=4),
}
DENSE = {"gpt_oss": GptOss, "llama4": Llama4}


def exported(name, path, dynamo=False):
    torch.manual_seed(7)
    block = ({**UNROLLED, **DENSE})[name]().eval()
    return files.export(block, path, torch.randn(2, 5, H), dynamo)


def check(captured, path):
    """One gate, one experts node, and the file's numbers at other sizes than it was traced with."""
    calls = [str(n.target) for n in captured.graph_module.graph.nodes if n.op == "call_function"]
    assert calls.count("moec.experts.default") == 1
    assert captured.moe_layers == (0,)
    for shape in ((1, 1, H), (3, 4, H), (2, 33, H)):
        x = torch.randn(shape)
        found = evaluate(captured.graph_module, [x], captured.read)
        assert files.relative_error(found, files.run(path, x)[0]) <= TOLERANCE
    return calls


@pytest.mark.parametrize("name", UNROLLED)
def test_unrolled_experts_are_lifted(tmp_path, name):
    path = exported(name, tmp_path / "m.onnx")
    assert sum(n.op_type == "NonZero" for n in onnx.load(path).graph.node) >= 4
    captured = capture(path)
    check(captured, path)
    (record,) = captured.certificates
    assert record["certificate"]["worst_relative_error_f64"] < 1e-8


@pytest.mark.parametrize("name", DENSE)
def test_experts_over_all_tokens_are_lifted(tmp_path, name):
    path = exported(name, tmp_path / "m.onnx")
    check(capture(path), path)


def test_todays_exporter_is_read(tmp_path):
    path = exported("mixtral", tmp_path / "m.onnx", dynamo=True)
    check(capture(path), path)


def test_an_engine_gives_what_onnx_runtime_gives(tmp_path):
    path = exported("dbrx", tmp_path / "m.onnx")
    engine = moec.compile(path, output=tmp_path / "m.engine")
    x = torch.randn(3, 4, H)
    assert files.relative_error(engine(x), files.run(path, x)[0]) <= TOLERANCE
    assert engine.inspect()["experts"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", {**UNROLLED, **DENSE})
def test_engines_of_every_family(tmp_path, name):
    path = exported(name, tmp_path / "m.onnx")
    engine = moec.compile(path, output=tmp_path / "m.engine")
    for shape in ((1, 1, H), (3, 4, H)):
        x = torch.randn(shape)
        assert files.relative_error(engine(x), files.run(path, x)[0]) <= TOLERANCE


def test_a_file_without_experts_is_compiled_and_it_is_said(tmp_path, caplog):
    w = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    files.write(tmp_path / "m.onnx", [node], [files.port("x", "float32", ["tokens", 4])], ["y"], {"w": w})
    with caplog.at_level(logging.WARNING):
        engine = moec.compile(tmp_path / "m.onnx")
    assert "m.onnx: no layer with experts was found" in caplog.text
    x = torch.randn(5, 4)
    assert files.relative_error(engine(x), x.numpy() @ w) <= 1e-6


def test_a_wrong_reading_is_refused_by_evaluation(tmp_path):
    """One expert whose result is counted twice is none of the same kind; nothing is lifted, the numbers stay right."""
    path = exported("dbrx", tmp_path / "m.onnx")
    model = onnx.load(path)
    scatters = [n for n in model.graph.node if n.op_type == "ScatterElements"]
    again = helper.make_node("Mul", [scatters[1].input[2]] * 2, ["squared"])
    model.graph.node.insert(list(model.graph.node).index(scatters[1]), again)
    scatters[1].input[2] = "squared"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(moec.compiler.errors.UnsupportedModel, match="was not lifted"):
        capture(path)


def test_an_unrolled_file_becomes_a_fused_one(tmp_path):
    """Through moec export-onnx: one node, the same names, the same numbers; and it is read again."""
    path = exported("dbrx", tmp_path / "m.onnx")
    moec.export_onnx(path, tmp_path / "fused.onnx", experts="com.microsoft")
    nodes = onnx.load(tmp_path / "fused.onnx").graph.node
    assert sum(n.op_type == "MoE" for n in nodes) == 1
    assert len(nodes) < len(onnx.load(path).graph.node) / 3
    x = torch.randn(3, 4, H)
    expected = files.run(path, x)[0]
    assert files.relative_error(files.run(tmp_path / "fused.onnx", x)[0], expected) <= TOLERANCE
    again = capture(tmp_path / "fused.onnx")
    assert files.relative_error(evaluate(again.graph_module, [x], again.read), expected) <= TOLERANCE
    assert again.info.config["onnx"]["inputs"] == ["x"]
