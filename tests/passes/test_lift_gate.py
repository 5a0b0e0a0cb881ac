"""lift-gate: every spelling of a gate becomes one moec::gate with the right spec; what is no gate stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gate_spellings import SPELLINGS, E, K, mixtral
from moe_block import experts_op, gate_case, hidden, parameters
from passing import FAMILIES, Case, check_bad_input, check_runs_once, check_same, family_case, function_case, reasons
from torch import Tensor
from torch.nn import functional as F
from zoo import build, tiny

from moec.compiler.capture.entry import capture
from moec.passes.ir.gate import GateSpec
from moec.passes.ir.text import graph_text
from moec.passes.lift_experts import LiftExperts
from moec.passes.lift_gate import LiftGate

GATE = torch.ops.moec.gate.default


def _specs(case: Case) -> list[GateSpec]:
    return [GateSpec.decode(n.args[2]) for n in case.gm.graph.find_nodes(op="call_function", target=GATE)]


@pytest.mark.null
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_reads_the_spec_of_every_spelling(spelling: str) -> None:
    case = gate_case(spelling)
    before = case.value()
    ledger = case.apply(LiftGate())["lift-gate"]
    assert not ledger.refused
    assert _specs(case) == [SPELLINGS[spelling][1]]
    # other orders of the same float32 steps: a few roundings of weights below 1, summed over K experts
    check_same(before, case.value(), 1e-5)


@pytest.mark.null
@pytest.mark.parametrize(
    "spelling", ["mixtral", "granite", "gpt_oss", "deepseek_v3", "sparsemixer", "reshaped", "turned"]
)
def test_lifts_spellings_in_bf16(spelling: str) -> None:
    case = gate_case(spelling, torch.bfloat16)
    ledger = case.apply(LiftGate())["lift-gate"]  # evidence compares with bf16's tolerance
    assert len(ledger.matched) == 1 and not ledger.refused


@pytest.mark.null
def test_lifts_a_bias_whose_sums_tie_in_bf16() -> None:
    """Scores plus a bias of 8 lie on bfloat16's grid of 1/16: most sums tie, and the scores behind them differ."""

    def route(m: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        _, experts = torch.topk(scores + (m.bias + 8).to(scores.dtype), K, dim=-1)
        weights = scores.gather(1, experts)
        return weights / (weights.sum(-1, keepdim=True) + 1e-6), experts

    case = gate_case(route, torch.bfloat16)
    ledger = case.apply(LiftGate())["lift-gate"]  # evidence compares with bf16's tolerance
    assert len(ledger.matched) == 1 and not ledger.refused
    (spec,) = _specs(case)
    assert (spec.score, spec.bias_on, spec.compute_dtype, spec.renormalise) == ("sigmoid", "scores", "bfloat16", True)


@pytest.mark.null
def test_fires(golden) -> None:
    case = gate_case(mixtral)
    case.apply(LiftGate())
    golden("mixtral", graph_text(case.gm))


EXPECTED = {
    "mixtral": GateSpec(2, renormalise=True),
    "qwen2_moe": GateSpec(2),
    "qwen3_moe": GateSpec(2, renormalise=True),
    "olmoe": GateSpec(2),
    "deepseek_v2": GateSpec(2, num_groups=2),
    "deepseek_v3": GateSpec(
        2,
        "sigmoid",
        renormalise=True,
        renorm_eps=1e-20,
        bias_on="scores",
        num_groups=2,
        group_score="sum_top2",
        group_mask=float("-inf"),
        scale=2.5,
    ),
    "gpt_oss": GateSpec(2, order="topk_then_score"),
    "glm4_moe": GateSpec(
        2,
        "sigmoid",
        renormalise=True,
        renorm_eps=1e-20,
        bias_on="scores",
        num_groups=2,
        group_score="sum_top2",
        group_mask=float("-inf"),
    ),
    "llama4_text": GateSpec(1, "sigmoid", "topk_then_score"),
    "granitemoe": GateSpec(2, order="topk_then_score"),
    "phimoe": GateSpec(2, "sparsemixer", jitter_eps=0.01),
    "minimax_m2": GateSpec(2, "sigmoid", renormalise=True, bias_on="scores"),
    "ernie4_5_moe": GateSpec(2, renormalise=True, renorm_eps=1e-12, renorm_rule="clamp", bias_on="scores"),
    "hunyuan_v1_moe": GateSpec(2, renormalise=True),
    "dots1": GateSpec(2, "sigmoid", bias_on="scores", num_groups=2, group_score="sum_top2", group_mask=float("-inf")),
}


@pytest.mark.null
@pytest.mark.parametrize("family", FAMILIES)
def test_matches_every_gate_of_a_family(family: str) -> None:
    case = family_case(family)
    ledger = case.apply(LiftExperts(), LiftGate())["lift-gate"]
    assert not ledger.refused and len(ledger.matched) == case.count(torch.ops.moec.experts.default) >= 2
    assert set(_specs(case)) == {EXPECTED[family]}
    routings = [
        n.args[1:3] for n in case.gm.graph.find_nodes(op="call_function", target=torch.ops.moec.experts.default)
    ]
    assert all(a.args[0].target is GATE and b.args[0] is a.args[0] for a, b in routings)  # no cast in between


def _no_term_of_ours(m, logits):
    weights, experts = logits.softmax(-1).topk(K)
    return weights + m.bias[experts], experts  # a term per expert


def _squared(m, logits):
    weights, experts = logits.softmax(-1).topk(K)
    return weights.square(), experts


def _second_and_third(m, logits):
    weights, experts = logits.softmax(-1).topk(3)
    return weights[:, 1:], experts[:, 1:]


REFUSED = {
    "term per expert": (_no_term_of_ours, "no gate rule agrees"),
    "squared weights": (_squared, "no gate rule agrees"),
    "second and third best": (_second_and_third, "no gate rule agrees"),
}


@pytest.mark.null
@pytest.mark.parametrize("name", REFUSED)
def test_leaves_other_rules_alone(name: str) -> None:
    route, reason = REFUSED[name]
    case = gate_case(route)
    text = graph_text(case.gm)
    ledger = case.apply(LiftGate())["lift-gate"]
    assert [reason in r for r in reasons(ledger)] == [True]
    assert graph_text(case.gm) == text


@pytest.mark.null
def test_leaves_routing_by_two_values_alone() -> None:
    def forward(m, x):
        weights, experts = (F.linear(x, m.router) + F.linear(x.flip(-1), m.router)).softmax(-1).topk(K)
        return experts_op(m, x, weights, experts)

    case = function_case(forward, hidden(), **parameters())
    ledger = case.apply(LiftGate())["lift-gate"]
    # the sum of both products is one value: the region narrows to it
    assert len(ledger.matched) == 1 or "reads linear" in reasons(ledger)[0]


@pytest.mark.null
def test_keeps_what_others_read() -> None:
    """Scores that the model returns beside the experts' output stay as they are."""

    def forward(m, x):
        scores = F.linear(x, m.router).softmax(-1)
        weights, experts = scores.topk(K)
        return experts_op(m, x, weights, experts), scores, experts, weights

    case = function_case(forward, hidden(), **parameters())
    before = case.value()
    case.apply(LiftGate())
    for a, b in zip(before, case.value(), strict=True):
        check_same(a, b, 1e-6)


@pytest.mark.null
def test_ties_go_to_the_lowest_expert_and_nan_stays() -> None:
    case = gate_case(mixtral)
    case.apply(LiftGate())
    (spec,) = _specs(case)
    weights, experts = spec.apply(torch.tensor([[0.5] * E, [float("nan")] * E]))
    assert experts[0].tolist() == [0, 1] and bool(weights[1].isnan().all())


@pytest.mark.null
def test_runs_twice_as_once() -> None:
    check_runs_once(LiftGate(), gate_case("deepseek_v3"))


@pytest.mark.null
def test_bad_input_raises() -> None:
    check_bad_input(LiftGate(), gate_case(mixtral))


REAL_SIZES = {
    "deepseek_v2": ({"n_routed_experts": 160, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3}, (6, 8, 3)),
    "deepseek_v3": ({"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}, (8, 8, 4)),
}


@pytest.mark.null
@pytest.mark.parametrize("family", REAL_SIZES)
def test_reads_groups_of_real_sizes(family: str) -> None:
    """Many experts in groups: ties between groups (scores that underflow) leave more open than ties between experts."""
    over, (top_k, groups, kept) = REAL_SIZES[family]
    captured = capture(build(tiny(family, num_hidden_layers=2, **over)))
    case = Case(captured.graph_module, captured.read)
    assert not case.apply(LiftGate())["lift-gate"].refused
    (spec,) = _specs(case)
    assert (spec.top_k, spec.num_groups, spec.groups_kept) == (top_k, groups, kept)
