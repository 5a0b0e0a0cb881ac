"""moec.export_onnx and its command: plain modules, options, and what is refused; nothing is left where it fails."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import moec
from moec import cli
from moec.compiler.export.onnx import publish as publishing
from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.onnx.session import open_session

MODEL = Path(__file__).parents[4] / "examples" / "data" / "tiny-moe"
pytestmark = pytest.mark.cpu


class Operators(nn.Module):
    """Many operators with two symbolic sizes: x [T, 6], n i64[S]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.linear = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, ...]:
        t = x.shape[0]
        h = self.norm(self.linear(x) * 2 - 1)
        h = torch.where(h > 0, nn.functional.gelu(h, approximate="tanh"), nn.functional.softplus(h))
        a, b = h.chunk(2, -1)
        heads = torch.cat([b, a], -1).view(t, 2, 4).transpose(0, 1)
        scores = (heads @ heads.transpose(1, 2)).softmax(-1)
        wide = torch.stack([x[:, ::2], x[:, 1::2]], -1).flatten(-2)
        ranks = (n // 3 + n % 4 - torch.arange(n.shape[0])).to(torch.float32)
        top, at = wide.topk(3, -1)
        spread = torch.zeros_like(wide).scatter(1, at, top.sigmoid()).cumsum(1)
        rows = self.table(n.clamp(0, 8)).mean(0, keepdim=True).expand(t, -1)
        return (
            scores,
            ranks,
            spread + rows.masked_fill(rows < 0, 0.5),
            (n >= 4) & ~(n == 5),
            wide.pow(2).sum(-1).rsqrt(),
        )


def test_a_plain_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Operators().eval()
    inputs = torch.randn(5, 6), torch.randint(0, 9, (7,))
    report = moec.export_onnx(module, tmp_path / "m.onnx", inputs)
    assert report.record["coverage"] == []
    session = open_session(report.path, threads=1)
    for x, n in (inputs, (torch.randn(2, 6), torch.randint(0, 9, (3,)))):
        with torch.no_grad():
            expected = module(x, n)
        found = session.run(None, {"x": x.numpy(), "n": n.numpy()})
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.numpy().dtype and one.shape == tuple(other.shape)
            assert np.allclose(one, other.numpy(), rtol=1e-5, atol=1e-5)  # float32, other orders of summing


class Unknown(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.i0e(x)


def test_an_operator_without_a_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no ONNX form for aten\.special_i0e"):
        moec.export_onnx(Unknown(), tmp_path / "m.onnx", (torch.randn(3, 4),))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": "onnx"}, "experts='onnx'; known: portable, com.microsoft"),
        ({"opset": 20}, "opset=20; known: 21 to"),
    ],
)
def test_options_without_a_meaning(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        moec.export_onnx(MODEL, tmp_path / "m.onnx", **options)


@pytest.fixture
def damaged(monkeypatch) -> None:
    """Changes the last byte of the data that is written: the lowest bit of an exponent."""
    plain = publishing.write_model

    def write(model, path, recipes, read, progress):
        plain(model, path, recipes, read, progress)
        data = path.with_name(f"{path.name}.data")
        content = bytearray(data.read_bytes())
        content[-1] ^= 1
        data.write_bytes(content)

    monkeypatch.setattr(publishing, "write_model", write)


def test_an_expert_that_is_not_the_checkpoints_is_named(tmp_path: Path, damaged) -> None:
    with pytest.raises(ExportError, match=r"layer 0, .*: expert .* is not the checkpoint's"):
        moec.export_onnx(MODEL, tmp_path / "m.onnx", layers=1)
    assert not os.listdir(tmp_path)


def test_a_file_that_answers_otherwise_is_not_published(tmp_path: Path, damaged) -> None:
    with pytest.raises(ExportError, match="output: ONNX Runtime differs from the captured graph by"):
        moec.export_onnx(nn.Linear(64, 64, bias=False), tmp_path / "m.onnx", (torch.randn(3, 64),))
    assert not os.listdir(tmp_path)


def test_the_command(tmp_path: Path, monkeypatch, capsys) -> None:
    output = tmp_path / "m.onnx"
    arguments = ["moec", "export-onnx", str(MODEL), "-o", str(output), "--layers", "1", "--json"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--experts", "com.microsoft"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == str(output) and report["verified"]["provider"] == "CPUExecutionProvider"
    assert [row["op"] for row in report["coverage"]] == ["com.microsoft.MoE"]
    assert report["coverage"] == json.loads((tmp_path / "m.onnx.json").read_text())["coverage"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "exists and is kept as it is" in " ".join(capsys.readouterr().err.split())
