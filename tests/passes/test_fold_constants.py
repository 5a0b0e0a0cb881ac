"""fold-constants: what no input reaches becomes a weight; operations without effect go."""

from __future__ import annotations

import pytest
import torch
from passing import check_bad_input, check_runs_once, check_same, family_case, function_case, reasons

from moec.passes.fold_constants import MOST_NUMBERS, FoldConstants
from moec.passes.infra.base import PassContext
from moec.passes.ir.text import graph_text
from moec.passes.ir.weights import weights_of

aten = torch.ops.aten
W = torch.randn(8, generator=torch.Generator().manual_seed(0))


def _frequencies(m, x):
    inverse = 1.0 / (1e6 ** (torch.arange(0, 8, dtype=torch.float32) / 8))
    return x * inverse * 1.0 + m.w.to(torch.bfloat16) / 1


@pytest.mark.null
def test_fires(golden) -> None:
    case = function_case(_frequencies, torch.randn(5, 8), w=W)
    before, text = case.value(), graph_text(case.gm)
    ledger = case.apply(FoldConstants())["fold-constants"]
    assert not ledger.refused
    assert {w.op for w in weights_of(case.gm).values()} >= {"literal", "cast"}
    assert [str(n.target) for n in case.gm.graph.nodes if n.op == "call_function"] == [
        "aten.mul.Tensor",
        "aten.add.Tensor",
    ]
    check_same(before, case.value())
    golden("frequencies", text + graph_text(case.gm))


@pytest.mark.null
def test_a_constant_of_weights_needs_the_checkpoint() -> None:
    case = function_case(lambda m, x: x * m.w.exp(), torch.randn(5, 8), w=W)
    result = FoldConstants().run(case.gm, PassContext(read=None))
    assert not result.changed
    assert "no checkpoint" in reasons(result.ledger)[0]
    before = case.value()
    assert case.apply(FoldConstants())["fold-constants"].matched
    check_same(before, case.value())


@pytest.mark.null
def test_leaves_alone_large_constants_and_sums_with_zero() -> None:
    many = MOST_NUMBERS + 1
    case = function_case(lambda m, x: x + torch.arange(many, dtype=torch.float32).sqrt(), torch.randn(5, many))
    assert f"a constant of {many} numbers" in reasons(case.apply(FoldConstants())["fold-constants"])[0]
    case = function_case(lambda m, x: (x + 0) * 2.0, torch.randn(5, 8))
    assert not case.apply(FoldConstants())["fold-constants"].matched


@pytest.mark.null
def test_a_product_with_one_that_changes_the_dtype_stays() -> None:
    case = function_case(lambda m, x: (x.long() * 1.0) + x, torch.randn(5, 8))
    case.apply(FoldConstants())
    assert case.count(aten.mul.Tensor) == 1


@pytest.mark.null
@pytest.mark.parametrize("family", ["mixtral", "phimoe", "llama4_text"])
def test_means_the_same_on_models(family: str) -> None:
    case = family_case(family, torch.bfloat16)
    before = case.value()
    assert case.apply(FoldConstants())["fold-constants"].matched
    if family == "phimoe":  # it computes its inverse frequencies in the graph
        assert not case.count(aten.reciprocal.default)
    check_same(before, case.value())


@pytest.mark.null
def test_positions_of_llama4_are_found() -> None:
    def forward(m, x):
        n = torch.arange(x.shape[0])
        return x * (n + (x[:, 0].long() - n))[:, None]

    case = function_case(forward, torch.randn(5, 8))
    before = case.value()
    case.apply(FoldConstants())
    assert not case.count(aten.arange.default)
    check_same(before, case.value())


@pytest.mark.null
def test_runs_twice_as_once() -> None:
    check_runs_once(FoldConstants(), family_case("phimoe"))


@pytest.mark.null
def test_bad_input_names_the_pass() -> None:
    case = function_case(_frequencies, torch.randn(5, 8), w=W)
    case.gm.graph.find_nodes(op="placeholder")[0].meta.clear()
    check_bad_input(FoldConstants(), case)
