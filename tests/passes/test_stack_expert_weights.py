"""stack-expert-weights: flags become recipes; the numbers stay."""

from __future__ import annotations

import pytest
import torch
from moe_block import experts_case, softmax_route
from passing import Case, check_bad_input, check_runs_once, check_same, family_case, reasons

from moec.passes.ir.text import graph_text
from moec.passes.stack_expert_weights import StackExpertWeights

EXPERTS = torch.ops.moec.experts.default


def _stored(transposed: bool, interleaved: bool) -> Case:
    """Experts whose parameters are made from canonical ones in the graph's own stored layout."""

    def forward(m, x):
        weights, experts = softmax_route(m, x)
        args = (m.w_in, m.w_out, m.b_in, m.b_out, None, "silu", 0, False, transposed, interleaved)
        return torch.ops.moec.experts(x, weights, experts, *args)

    case = experts_case(forward)
    return case


@pytest.mark.null
def test_fires(golden) -> None:
    case = _stored(False, True)
    case.apply(StackExpertWeights())
    golden("interleaved", graph_text(case.gm))


@pytest.mark.null
def test_means_the_same() -> None:
    case = _stored(False, True)
    before = case.value()
    assert len(case.apply(StackExpertWeights())["stack-expert-weights"].matched) == 1
    check_same(before, case.value())  # the same rows in another order: not one product changes


@pytest.mark.null
def test_lays_out_a_family() -> None:
    case = family_case("gpt_oss")
    before = case.value()
    ledger = case.apply(StackExpertWeights())["stack-expert-weights"]
    assert [m.detail for m in ledger.matched] == ["transposed and interleaved"] * 3
    assert all(not any(n.args[9:]) for n in case.gm.graph.find_nodes(op="call_function", target=EXPERTS))
    check_same(before, case.value(), 1e-5)  # rows instead of columns: sums in another order


@pytest.mark.null
def test_leaves_computed_weights_alone() -> None:
    def forward(m, x):
        weights, experts = softmax_route(m, x)
        args = (m.w_in * 2, m.w_out, None, None, None, "silu", 0, False, False, True)
        return torch.ops.moec.experts(x, weights, experts, *args)

    case = experts_case(forward)
    text = graph_text(case.gm)
    ledger = case.apply(StackExpertWeights())["stack-expert-weights"]
    assert "only stored weights are laid out anew" in reasons(ledger)[0] and graph_text(case.gm) == text


@pytest.mark.null
def test_runs_twice_as_once() -> None:
    check_runs_once(StackExpertWeights(), _stored(False, True))


@pytest.mark.null
def test_bad_input_raises() -> None:
    check_bad_input(StackExpertWeights(), _stored(False, True))
