"""Exported programs as models: in memory and from files that are trusted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import moec
from moec import cli
from moec.compiler.errors import CheckpointError, CompileError, UnsupportedModel
from moec.passes.ir.evaluate import evaluate

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32: sums in another order


class Moe(nn.Module):
    """The two best of four experts, gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, 64, 16) / 4)
        self.down = nn.Parameter(torch.randn(4, 16, 32) / 6)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        gate, up = torch.einsum("th,tkfh->tkf", x, self.up[chosen]).chunk(2, -1)
        every = torch.einsum("tkf,tkhf->tkh", F.silu(gate) * up, self.down[chosen])
        return (every * weights[..., None]).sum(1) * scale


def exported(dynamic: bool = True, decomposed: bool = False) -> tuple[nn.Module, torch.export.ExportedProgram]:
    torch.manual_seed(0)
    module = Moe().eval()
    sizes = {"x": {0: torch.export.Dim("tokens", min=2, max=512)}, "scale": None} if dynamic else None
    program = torch.export.export(module, (torch.randn(6, 16),), {"scale": torch.ones(16)}, dynamic_shapes=sizes)
    return module, program.run_decompositions() if decomposed else program


@pytest.mark.cpu
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_compiles_to_an_engine(decomposed):
    module, program = exported(decomposed=decomposed)
    before = str(program.graph)
    engine = moec.compile(program)
    for tokens in (2, 6, 33):
        x, scale = torch.randn(tokens, 16), torch.randn(16)
        torch.testing.assert_close(engine(x, scale), module(x, scale).detach(), **CLOSE)
    assert engine.inspect()["ledger"]["lift-experts"]["matched"] == 1
    assert str(program.graph) == before


@pytest.mark.null
def test_fixed_sizes_stay_fixed():
    module, program = exported(dynamic=False)
    captured = moec.capture(program)
    assert captured.symbols == {}
    x, scale = torch.randn(6, 16), torch.randn(16)
    torch.testing.assert_close(evaluate(captured.graph_module, [x, scale], captured.read), module(x, scale), **CLOSE)


@pytest.mark.cpu
def test_a_trusted_file_compiles(tmp_path, monkeypatch):
    module, program = exported()
    torch.export.save(program, tmp_path / "moe.pt2")
    arguments = ["moec", "compile", str(tmp_path / "moe.pt2"), "-o", str(tmp_path / "moe.engine"), "--trust-pt2"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    x, scale = torch.randn(9, 16), torch.randn(16)
    torch.testing.assert_close(moec.load(tmp_path / "moe.engine")(x, scale), module(x, scale).detach(), **CLOSE)


@pytest.mark.null
def test_a_file_is_not_read_without_trust(tmp_path, monkeypatch):
    path = tmp_path / "moe.pt2"
    path.write_bytes(b"anything")
    monkeypatch.setattr(torch.export, "load", lambda _: pytest.fail("the file was read"))
    for call in (moec.capture, moec.compile):
        with pytest.raises(CompileError, match=r"moe\.pt2: torch\.export\.load may unpickle .*trust_pt2=True") as error:
            call(path)
        assert "\n" not in str(error.value)


@pytest.mark.null
def test_damaged_and_missing_files_are_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file"):
        moec.capture(tmp_path / "absent.pt2", trust_pt2=True)
    (tmp_path / "text.pt2").write_text("no archive")
    with pytest.raises(CheckpointError, match=r"not an archive of torch\.export"):
        moec.capture(tmp_path / "text.pt2", trust_pt2=True)
    _, program = exported()
    torch.export.save(program, tmp_path / "whole.pt2")
    (tmp_path / "cut.pt2").write_bytes((tmp_path / "whole.pt2").read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"cut\.pt2"):
        moec.capture(tmp_path / "cut.pt2", trust_pt2=True)


@pytest.mark.null
def test_what_has_no_meaning_is_refused():
    _, program = exported()
    with pytest.raises(CompileError, match="not to an exported program"):
        moec.capture(program, layers=2)

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            return x * self.calls

    with pytest.raises(UnsupportedModel, match="writes"):
        moec.capture(torch.export.export(Counts(), (torch.ones(2),)))
