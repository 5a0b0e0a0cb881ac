"""sink-transposes: a transpose moves behind what does not care, and meets the one that undoes it."""

from __future__ import annotations

import pytest
import torch
from passing import SOME_CASES, check_bad_input, check_runs_once, check_same, family_case, function_case

from moec.passes.drop_batch_axis import DropBatchAxis
from moec.passes.fold_views import FoldViews
from moec.passes.ir.text import graph_text
from moec.passes.lift_norm import LiftNorm
from moec.passes.lift_rope import LiftRope
from moec.passes.sink_transposes import SinkTransposes

aten = torch.ops.aten
W = torch.randn(4, generator=torch.Generator().manual_seed(0))


def _heads_first(m, x):
    heads = x.view(x.shape[0], 2, 4).neg().transpose(0, 1)  # [2, T, 4]
    normed = torch.ops.moec.rms_norm(heads, m.w, 1e-5, "before_weight", 0.0, False)
    a, b = normed.split([1, 3], -1)
    return (torch.cat([b, a], -1) * m.w).transpose(0, 1)


@pytest.mark.null
def test_fires(golden) -> None:
    case = function_case(_heads_first, torch.randn(5, 8), w=W)
    before, text = case.value(), graph_text(case.gm)
    assert case.apply(SinkTransposes())["sink-transposes"].matched
    middle = graph_text(case.gm)
    case.apply(FoldViews())
    assert not case.count(aten.transpose.int)
    check_same(before, case.value())
    golden("heads_first", text + middle + graph_text(case.gm))


@pytest.mark.null
@pytest.mark.parametrize(("family", "dtype"), SOME_CASES)
def test_no_transpose_is_left_in_a_model(family: str, dtype: torch.dtype) -> None:
    case = family_case(family, dtype)
    case.prepare(LiftNorm(), LiftRope(), DropBatchAxis(), FoldViews())
    before = case.value()
    case.apply(SinkTransposes(), FoldViews())
    in_experts = (
        family == "llama4_text"
    )  # its experts are spelled out as batched products; lift-experts is another pass
    assert case.count(aten.transpose.int) == (2 if in_experts else 0)
    check_same(before, case.value())


@pytest.mark.null
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x.transpose(0, 1).softmax(-1),
        lambda m, x: x.view(x.shape[0], 2, 4).transpose(1, 2) * m.w[:2],
        lambda m, x: torch.ops.moec.rms_norm(
            x.view(x.shape[0], 4, 2).transpose(1, 2), m.w, 1e-5, "before_weight", 0.0, False
        ),
        lambda m, x: torch.cat([x.view(x.shape[0], 2, 4).transpose(0, 1), x.view(2, x.shape[0], 4)], -1),
    ],
)
def test_leaves_alone_what_cares(forward) -> None:
    case = function_case(forward, torch.randn(5, 8), w=W)
    before = case.value()
    assert not case.apply(SinkTransposes())["sink-transposes"].matched
    check_same(before, case.value())


@pytest.mark.null
def test_runs_twice_as_once_after_the_views_are_folded() -> None:
    case = family_case("deepseek_v3")
    case.prepare(LiftNorm(), LiftRope(), DropBatchAxis(), FoldViews(), SinkTransposes(), FoldViews())
    check_runs_once(SinkTransposes(), case)


@pytest.mark.null
def test_bad_input_names_the_pass() -> None:
    check_bad_input(SinkTransposes(), function_case(_heads_first, torch.randn(5, 8), w=W))
