"""merge-duplicates: equal pure calls become one; writes, random numbers and outputs stay."""

from __future__ import annotations

import pytest
import torch
from passing import check_runs_once, check_same, family_case, function_case

from moec.passes.ir.text import graph_text
from moec.passes.merge_duplicates import MergeDuplicates

aten = torch.ops.aten


@pytest.mark.null
def test_fires(golden) -> None:
    case = function_case(lambda m, x: x.float().exp() + x.float().exp() * x.exp(), torch.randn(5, 8))
    before, text = case.value(), graph_text(case.gm)
    ledger = case.apply(MergeDuplicates())["merge-duplicates"]
    assert len(ledger.matched) == 2 and case.count(aten.exp.default) == 1
    check_same(before, case.value())
    golden("three_of_a_kind", text + graph_text(case.gm))


@pytest.mark.null
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "llama4_text"])
def test_means_the_same_on_models(family: str) -> None:
    case = family_case(family)
    before, count = case.value(), len(case.gm.graph.nodes)
    case.apply(MergeDuplicates())
    assert len(case.gm.graph.nodes) < count
    attention = "latent_attention" if family == "deepseek_v3" else "cached_attention"
    assert case.count(getattr(torch.ops.moec, attention).default) == len(case.inputs[3:]) / 2
    check_same(before, case.value())


@pytest.mark.null
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (x + 1) * (x + 2),
        lambda m, x: x.sum(-1, keepdim=True) + x.sum(0, keepdim=True),
        lambda m, x: torch.bernoulli(x) + torch.bernoulli(x),
    ],
)
def test_leaves_alone_what_differs(forward) -> None:
    case = function_case(forward, torch.ones(5, 8))
    assert not case.apply(MergeDuplicates())["merge-duplicates"].matched


@pytest.mark.null
def test_one_and_one_point_zero_are_not_equal() -> None:
    case = function_case(lambda m, x: (x.long() * 1) + (x.long() * 1.0), torch.ones(5, 8))
    case.apply(MergeDuplicates())
    assert case.count(aten.mul.Tensor) == 2


@pytest.mark.null
def test_runs_twice_as_once() -> None:
    check_runs_once(MergeDuplicates(), family_case("llama4_text"))
