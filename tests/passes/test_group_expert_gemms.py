"""group-expert-gemms: dispatch, grouped product, combine mean what moec::experts means, in every variant of it."""

from __future__ import annotations

import pytest
import torch
from moe_block import experts_case, experts_op, softmax_route
from passing import Case, check_bad_input, check_runs_once, check_same, family_case, reasons

from moec.passes.group_expert_gemms import GroupExpertGemms
from moec.passes.ir.text import graph_text
from moec.passes.lift_experts import LiftExperts
from moec.passes.stack_expert_weights import StackExpertWeights

EXPERTS = torch.ops.moec.experts.default


def _case(*, biases: bool = False, shared: str = "none", act: str = "silu", on_input: bool = False) -> Case:
    def forward(m, x):
        weights, experts = softmax_route(m, x)
        b = (m.b_in, m.b_out) if biases else (None, None)
        gate = torch.sigmoid(x[:, 0]) if shared == "gated" else None
        num_shared = 0 if shared == "none" else 2
        experts = experts % (8 - num_shared)
        return torch.ops.moec.experts(x, weights, experts, m.w_in, m.w_out, *b, gate, act, num_shared, on_input)

    return experts_case(forward)


VARIANTS = {
    "plain": {},
    "biases": {"biases": True},
    "two shared": {"shared": "plain"},
    "two shared behind a gate": {"shared": "gated", "biases": True},
    "weight on input": {"on_input": True},
    "clamped": {"act": "swigluoai@7.0@1.702", "biases": True},
}


@pytest.mark.null
@pytest.mark.parametrize("name", VARIANTS)
def test_means_the_same(name: str) -> None:
    case = _case(**VARIANTS[name])
    before = case.value()
    ledger = case.apply(GroupExpertGemms())["group-expert-gemms"]
    assert len(ledger.matched) == 1 and not case.count(EXPERTS)
    check_same(before, case.value(), 1e-6)  # the same rows and products; sums over experts in the same order or nearly


@pytest.mark.null
def test_fires(golden) -> None:
    case = experts_case(lambda m, x: experts_op(m, x, *softmax_route(m, x)))
    case.apply(GroupExpertGemms())
    golden("plain", graph_text(case.gm))


@pytest.mark.null
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_groups_every_layer_of_a_family(family: str) -> None:
    case = family_case(family)
    case.apply(LiftExperts(), StackExpertWeights())
    sites = case.count(EXPERTS)
    ledger = case.apply(GroupExpertGemms())["group-expert-gemms"]
    assert not ledger.refused and len(ledger.matched) == sites >= 2 and not case.count(EXPERTS)


@pytest.mark.null
def test_leaves_other_layouts_alone() -> None:
    case = family_case("gpt_oss")
    text = graph_text(case.gm)
    ledger = case.apply(GroupExpertGemms())["group-expert-gemms"]
    assert all("not in canonical layout" in r for r in reasons(ledger)) and len(ledger.refused) == 3
    assert graph_text(case.gm) == text


@pytest.mark.null
def test_runs_twice_as_once() -> None:
    check_runs_once(GroupExpertGemms(), _case())


@pytest.mark.null
def test_bad_input_raises() -> None:
    check_bad_input(GroupExpertGemms(), _case())
