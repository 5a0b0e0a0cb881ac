"""drop-batch-axis: operations on [1, T, ..] work on [T, ..]; values keep their names and shapes."""

from __future__ import annotations

import pytest
import torch
from passing import SOME_CASES, check_bad_input, check_runs_once, check_same, family_case, function_case, reasons

from moec.passes.drop_batch_axis import DropBatchAxis
from moec.passes.fold_views import FoldViews
from moec.passes.ir.text import graph_text
from moec.passes.lift_norm import LiftNorm
from moec.passes.lift_rope import LiftRope

aten = torch.ops.aten
W = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


def _layer(m, x):
    h = torch.nn.functional.linear(x[None], m.w)  # [1, T, 8]
    a, b = h.view(1, x.shape[0], 2, 4).transpose(1, 2).split([1, 3], -1)
    return (torch.cat([b, a], -1).softmax(-1) * 2.0)[0].transpose(0, 1)


@pytest.mark.null
def test_fires(golden) -> None:
    case = function_case(_layer, torch.randn(5, 8), w=W)
    before, text = case.value(), graph_text(case.gm)
    ledger = case.apply(DropBatchAxis())["drop-batch-axis"]
    assert ledger.matched and not ledger.refused
    check_same(before, case.value())
    golden("layer", text + graph_text(case.gm))


@pytest.mark.null
@pytest.mark.parametrize(("family", "dtype"), SOME_CASES)
def test_families_end_without_a_batch_axis(family: str, dtype: torch.dtype) -> None:
    case = family_case(family, dtype)
    case.prepare(LiftNorm(), LiftRope())
    before = case.value()
    case.apply(DropBatchAxis(), FoldViews())
    left = [n.name for n in case.gm.graph.nodes if _is_batch(n)]
    assert not left, f"still in batch form: {left}"
    check_same(before, case.value())


def _is_batch(node) -> bool:
    val = node.meta.get("val")
    return node.op == "call_function" and isinstance(val, torch.Tensor) and val.dim() == 3 and val.shape[0] == 1


@pytest.mark.null
@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: x[None].cumsum(0), "no rule for aten.cumsum.default"),
        (lambda m, x: x[None].softmax(0), "it works along the batch axis"),
        (lambda m, x: torch.cat([x[None], x[None]], 1).flip(1), "no rule for aten.flip.default"),
    ],
)
def test_leaves_alone_with_a_reason(forward, reason: str) -> None:
    case = function_case(forward, torch.randn(5, 8))
    before = case.value()
    ledger = case.apply(DropBatchAxis())["drop-batch-axis"]
    assert reasons(ledger) == [reason]
    check_same(before, case.value())


@pytest.mark.null
def test_runs_twice_as_once_after_the_views_are_folded() -> None:
    case = family_case("mixtral")
    case.prepare(LiftNorm(), LiftRope(), DropBatchAxis(), FoldViews())
    check_runs_once(DropBatchAxis(), case)


@pytest.mark.null
def test_bad_input_names_the_pass() -> None:
    case = family_case("mixtral")
    for node in case.gm.graph.nodes:
        if node.op == "placeholder":
            node.meta.pop("val")
    check_bad_input(DropBatchAxis(), case)
