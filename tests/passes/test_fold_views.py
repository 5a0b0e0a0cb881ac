"""fold-views: chains of shape operations that keep the order of elements become one view or nothing."""

from __future__ import annotations

import pytest
import torch
from passing import check_bad_input, check_runs_once, check_same, family_case, function_case

from moec.passes.drop_batch_axis import DropBatchAxis
from moec.passes.fold_views import SHAPINGS, FoldViews
from moec.passes.ir.text import graph_text
from moec.passes.lift_norm import LiftNorm
from moec.passes.lift_rope import LiftRope

aten = torch.ops.aten


def _shapings(case) -> int:
    return sum(case.count(t) for t in SHAPINGS)


CHAINS = {
    "there and back": (lambda m, x: x.neg()[None].transpose(1, 2).transpose(1, 2)[0], 0),
    "transposes around a view": (
        lambda m, x: x.neg()[None].view(1, x.shape[0], 2, 4).transpose(1, 2)[0].transpose(0, 1),
        1,
    ),
    "expand that expands nothing": (lambda m, x: x.neg().expand(x.shape[0], 8), 0),
    "flatten after unflatten": (lambda m, x: x.neg().view(x.shape[0], 2, 4).flatten(1), 0),
    "whole slice": (lambda m, x: x.neg()[:, 0:8], 0),
}


@pytest.mark.null
@pytest.mark.parametrize("chain", CHAINS)
def test_fires(chain: str) -> None:
    forward, left = CHAINS[chain]
    case = function_case(forward, torch.randn(5, 8))
    before = case.value()
    case.apply(FoldViews())
    assert _shapings(case) == left
    check_same(before, case.value())


@pytest.mark.null
def test_golden(golden) -> None:
    case = function_case(CHAINS["transposes around a view"][0], torch.randn(5, 8))
    text = graph_text(case.gm)
    case.apply(FoldViews())
    golden("transposes_around_a_view", text + graph_text(case.gm))


@pytest.mark.null
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x.neg().view(x.shape[0], 2, 4).transpose(1, 2).reshape(x.shape[0], 8),
        lambda m, x: x.neg()[:, 0:4],
        lambda m, x: x.neg().transpose(0, 1),
        lambda m, x: x.neg().view(x.shape[0], 2, 4),
    ],
)
def test_leaves_alone_what_reorders_or_is_one_operation(forward) -> None:
    case = function_case(forward, torch.randn(5, 8))
    before, count = case.value(), _shapings(case)
    assert not case.apply(FoldViews())["fold-views"].matched
    assert _shapings(case) == count
    check_same(before, case.value())


@pytest.mark.null
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "llama4_text"])
def test_means_the_same_on_models(family: str) -> None:
    case = family_case(family, torch.bfloat16)
    case.prepare(LiftNorm(), LiftRope(), DropBatchAxis())
    before, count = case.value(), _shapings(case)
    case.apply(FoldViews())
    assert _shapings(case) < count / 4
    check_same(before, case.value())


@pytest.mark.null
def test_runs_twice_as_once() -> None:
    case = family_case("deepseek_v3")
    case.prepare(DropBatchAxis())
    check_runs_once(FoldViews(), case)


@pytest.mark.null
def test_bad_input_names_the_pass() -> None:
    check_bad_input(FoldViews(), family_case("mixtral"))
