"""fuse-residual-norm: a sum and the norm that reads it become one op with two results."""

from __future__ import annotations

import pytest
import torch
from passing import check_bad_input, check_runs_once, check_same, family_case, function_case, reasons

from moec.passes.fuse_residual_norm import FuseResidualNorm
from moec.passes.infra.errors import PassError
from moec.passes.ir.text import graph_text
from moec.passes.lift_norm import LiftNorm

FUSED = torch.ops.moec.add_rms_norm.default
W = torch.randn(8, generator=torch.Generator().manual_seed(0))


def _norm(m, x):
    return torch.ops.moec.rms_norm(x, m.w, 1e-5, "before_weight", 0.0, False)


def _block(m, x):
    total = x + x.sigmoid()
    return _norm(m, total) + total


@pytest.mark.null
def test_fires(golden) -> None:
    case = function_case(_block, torch.randn(5, 8), w=W)
    before, text = case.value(), graph_text(case.gm)
    ledger = case.apply(FuseResidualNorm())["fuse-residual-norm"]
    assert len(ledger.matched) == 1 and case.count(FUSED) == 1
    check_same(before, case.value())
    golden("block", text + graph_text(case.gm))


@pytest.mark.null
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_every_layer_of_a_model_has_two(family: str) -> None:
    case = family_case(family, torch.bfloat16)
    before = case.value()
    ledger = case.apply(LiftNorm(), FuseResidualNorm())["fuse-residual-norm"]
    layers = 4 if family == "llama4_text" else 3
    assert len(ledger.matched) == 2 * layers and not ledger.refused
    check_same(before, case.value())


@pytest.mark.null
@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: _norm(m, x + x[:1]), "broadcasts"),
        (lambda m, x: _norm(m, x + x.to(torch.bfloat16)), "mixes torch.float32 and torch.bfloat16"),
        (lambda m, x: _norm(m, torch.add(x, x, alpha=2)), "scales an operand"),
        (lambda m, x: _norm(m, x + 1.0), "adds a number"),
    ],
)
def test_leaves_alone_with_a_reason(forward, reason: str) -> None:
    case = function_case(forward, torch.randn(5, 8), w=W)
    before = case.value()
    ledger = case.apply(FuseResidualNorm())["fuse-residual-norm"]
    assert not ledger.matched and reason in reasons(ledger)[0]
    check_same(before, case.value())


@pytest.mark.null
def test_a_second_norm_of_the_same_sum_stays() -> None:
    case = function_case(lambda m, x: _norm(m, s := x + x.sigmoid()) * _norm(m, s).neg(), torch.randn(5, 8), w=W)
    before = case.value()
    ledger = case.apply(FuseResidualNorm())["fuse-residual-norm"]
    assert len(ledger.matched) == 1 and reasons(ledger) == ["its sum is fused with another norm"]
    check_same(before, case.value())


@pytest.mark.null
def test_runs_twice_as_once() -> None:
    case = family_case("mixtral")
    case.prepare(LiftNorm())
    check_runs_once(FuseResidualNorm(), case)


@pytest.mark.null
def test_bad_input_names_the_pass() -> None:
    check_bad_input(FuseResidualNorm(), function_case(_block, torch.randn(5, 8), w=W))


@pytest.mark.null
def test_a_forgotten_residual_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong fusion (the branch added twice, the residual dropped) is named by evidence."""
    monkeypatch.setattr("moec.passes.fuse_residual_norm._operands", lambda total: (total.args[1], total.args[1]))
    case = family_case("mixtral")
    case.prepare(LiftNorm())
    with pytest.raises(PassError, match=r"pass fuse-residual-norm: layer \d"):
        case.apply(FuseResidualNorm())
