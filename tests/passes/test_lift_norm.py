"""lift-norm: all spellings become one op; what is no RMS norm stays, with a reason."""

from __future__ import annotations

import pytest
import torch
from passing import (
    CASES,
    check_bad_input,
    check_runs_once,
    check_same,
    family_case,
    function_case,
    reasons,
)

from moec.passes.fold_views import FoldViews
from moec.passes.ir.text import graph_text
from moec.passes.lift_norm import LiftNorm

EPS = 1e-5
RMS_NORM = torch.ops.moec.rms_norm.default


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def _centred(x: torch.Tensor) -> torch.Tensor:
    return _unit(x - x.mean(-1, keepdim=True))


SPELLINGS = {
    "weight after the cast": (lambda m, x: m.w * _unit(x.float()).to(x.dtype), ("before_weight", 0.0, False)),
    "weight before the cast": (lambda m, x: (m.w * _unit(x.float())).to(x.dtype), ("after_weight", 0.0, False)),
    "type_as": (lambda m, x: _unit(x.float()).type_as(x) * m.w, ("before_weight", 0.0, False)),
    "no weight": (lambda m, x: _unit(x.float()).type_as(x), ("before_weight", 0.0, False)),
    "one plus weight": (
        lambda m, x: (_unit(x.float()) * (1.0 + m.w.float())).type_as(x),
        ("after_weight", 1.0, False),
    ),
    "centred": (lambda m, x: (m.w.float() * _centred(x.float())).to(x.dtype), ("after_weight", 0.0, True)),
    "square by product": (
        lambda m, x: m.w * (x.float() * torch.rsqrt((x.float() * x.float()).mean(-1, keepdim=True) + EPS)).to(x.dtype),
        ("before_weight", 0.0, False),
    ),
    "division by a root": (
        lambda m, x: m.w * (x.float() / torch.sqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype),
        ("before_weight", 0.0, False),
    ),
    "negative power": (
        lambda m, x: m.w * (x.float() * torch.pow(x.float().pow(2).mean(-1, keepdim=True) + EPS, -0.5)).to(x.dtype),
        ("before_weight", 0.0, False),
    ),
    "torch's own": (lambda m, x: torch.nn.functional.rms_norm(x, (32,), m.w, EPS), ("after_weight", 0.0, False)),
}


def _case(spelling: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 32, generator=generator).to(dtype)
    weight = {} if spelling == "no weight" else {"w": torch.randn(32, generator=generator).to(dtype)}
    return function_case(SPELLINGS[spelling][0], x, **weight)


@pytest.mark.null
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fires_on_every_spelling(spelling: str) -> None:
    case = _case(spelling, torch.bfloat16)
    before = case.value()
    ledger = case.apply(LiftNorm())["lift-norm"]
    assert len(ledger.matched) == 1 and not ledger.refused
    (node,) = case.gm.graph.find_nodes(op="call_function", target=RMS_NORM)
    assert node.args[2:] == (EPS, *SPELLINGS[spelling][1])
    assert sum(n.op == "call_function" for n in case.gm.graph.nodes) == 1
    # the same float32 steps and the same roundings; other square roots may differ in the last bit of a few values
    exact = spelling not in ("division by a root", "negative power", "torch's own")
    check_same(before, case.value(), 0.0 if exact else 2**-8)


@pytest.mark.null
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_no_norm_of_a_family_is_missed(family: str, dtype: torch.dtype) -> None:
    case = family_case(family, dtype)
    before = case.value()
    ledger = case.apply(LiftNorm())["lift-norm"]
    if family == "phimoe":
        assert len(ledger.refused) == 7 and not ledger.matched
        assert set(reasons(ledger)) == {"layer norm with a bias: aten.layer_norm is one kernel already"}
    else:
        assert not ledger.refused and len(ledger.matched) >= 7
    assert not case.count(torch.ops.aten.rsqrt.default)
    assert all(m.layer is None or 0 <= m.layer < 4 for m in ledger.matched)
    check_same(before, case.value())


@pytest.mark.null
def test_golden(golden) -> None:
    case = _case("weight after the cast", torch.bfloat16)
    before = graph_text(case.gm)
    case.apply(LiftNorm())
    golden("weight_after_the_cast", before + graph_text(case.gm))


NEAR_MISSES = {
    "eps outside the root": lambda m, x: m.w * (x / (torch.sqrt(x.pow(2).mean(-1, keepdim=True)) + EPS)),
    "mean over the wrong axis": lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + EPS)),
    "sum for mean": lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS)),
    "clamped": lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(min=1e-3))),
    "two plus weight": lambda m, x: _unit(x) * (2.0 + m.w),
}


@pytest.mark.null
@pytest.mark.parametrize("near_miss", NEAR_MISSES)
def test_leaves_alone_what_is_no_rms_norm(near_miss: str) -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    case = function_case(NEAR_MISSES[near_miss], x, w=torch.randn(32, generator=torch.Generator().manual_seed(1)))
    ledger = case.apply(LiftNorm())["lift-norm"]
    if near_miss == "two plus weight":  # the norm itself is one, without the weight
        assert [m.detail for m in ledger.matched] == ["eps 1e-05, before_weight, offset 0"]
        assert case.count(torch.ops.aten.mul.Tensor) == 1
        return
    assert not ledger.matched and len(ledger.refused) == 1
    assert "equals no form of moec::rms_norm" in reasons(ledger)[0] or "no region" in reasons(ledger)[0]


@pytest.mark.null
def test_a_gate_beside_the_norm_stays_outside() -> None:
    case = function_case(
        lambda m, x: m.w * _unit(x) * torch.nn.functional.silu(x), torch.randn(5, 32), w=torch.ones(32)
    )
    assert len(case.apply(LiftNorm())["lift-norm"].matched) == 1
    assert case.count(torch.ops.aten.silu.default) == 1


@pytest.mark.null
def test_runs_twice_as_once() -> None:
    check_runs_once(LiftNorm(), family_case("qwen3_moe"))


@pytest.mark.null
def test_bad_input_names_the_pass() -> None:
    check_bad_input(LiftNorm(), family_case("mixtral"))


@pytest.mark.null
def test_wrong_constants_are_caught_by_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recogniser that reads the wrong eps does not pass: the verification on probes refuses it."""
    monkeypatch.setattr("moec.passes.lift_norm._eps", lambda root: 1e-2)
    ledger = family_case("mixtral").apply(LiftNorm(), FoldViews())["lift-norm"]
    assert not ledger.matched and len(ledger.refused) == 7
