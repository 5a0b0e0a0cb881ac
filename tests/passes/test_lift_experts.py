"""lift-experts: experts in any ATen spelling become one moec::experts; what is something else stays, with a reason."""

from __future__ import annotations

import pytest
import torch
from experts_forms import FORMS, gathered
from gate_spellings import E, K
from moe_block import experts_case, experts_op, softmax_route
from passing import Case, check_bad_input, check_runs_once, check_same, family_case, reasons
from torch.nn import functional as F

from moec.passes.ir.experts_call import ExpertsCall
from moec.passes.ir.text import graph_text
from moec.passes.lift_experts import LiftExperts
from moec.passes.lift_gate import LiftGate

EXPERTS = torch.ops.moec.experts.default


def _case(form: str) -> Case:
    # aten._grouped_mm takes 16-bit operands only
    return experts_case(FORMS[form], torch.bfloat16 if form == "grouped" else torch.float32)


def _calls(case: Case) -> list[ExpertsCall]:
    return [ExpertsCall.of(n) for n in case.gm.graph.find_nodes(op="call_function", target=EXPERTS)]


ACTIVATIONS = {"gathered_with_biases": "swigluoai@7.0@1.702", "unrolled_separately": "gelu", "without_gate": "!relu2"}


@pytest.mark.null
@pytest.mark.parametrize("form", FORMS)
def test_fires_on_every_form(form: str) -> None:
    case = _case(form)
    before = case.value()
    ledger = case.apply(LiftExperts())["lift-experts"]
    assert len(ledger.matched) == 1 and not ledger.refused
    (call,) = _calls(case)
    assert call.act == ACTIVATIONS.get(form, "silu")
    assert call.weight_on_input == (form == "dense_on_input")
    assert (call.b_gate_up is not None) == ("with_biases" in form)
    # float32: sums in another order; bf16: one rounding of the sum over experts instead of several
    check_same(before, case.value(), 2**-6 if form == "grouped" else 1e-5)


def _another_number(m, x):
    """Clamped at 7, which rows of ordinary size never reach, with a smaller number in the region."""
    weights, experts = softmax_route(m, x)
    slots = experts.reshape(-1)
    h = torch.bmm(m.w_in[slots], (x * 6.0 * (1 / 6.0)).repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
    gate, up = h.chunk(2, -1)
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    h = (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    y = torch.bmm(m.w_out[slots], h.unsqueeze(-1)).squeeze(-1) * weights.reshape(-1, 1)
    return y.view(x.shape[0], K, -1).sum(1)


@pytest.mark.null
def test_a_limit_that_few_rows_reach_is_the_right_one() -> None:
    case = experts_case(_another_number)
    case.apply(LiftExperts())
    (call,) = _calls(case)
    assert call.act == "swigluoai@7.0@1.702"


@pytest.mark.null
@pytest.mark.parametrize("form", ["gathered", "unrolled_separately"])
def test_fires(form: str, golden) -> None:
    case = _case(form)
    case.apply(LiftExperts())
    golden(form, graph_text(case.gm))


@pytest.mark.null
def test_fires_on_batches_of_sequences() -> None:
    """[B, S, H] without a view to rows."""

    def forward(m, x):
        weights, experts = F.linear(x, m.router).softmax(-1).topk(K)
        y = torch.zeros_like(x)
        for e in range(E):
            gate, up = F.linear(x, m.w_in[e]).chunk(2, -1)
            y = y + F.linear(F.silu(gate) * up, m.w_out[e]) * ((experts == e) * weights).sum(-1, keepdim=True)
        return y

    case = experts_case(forward, torch.float32, 2, 5)
    before = case.value()
    ledgers = case.apply(LiftExperts(), LiftGate())
    assert len(ledgers["lift-experts"].matched) == len(ledgers["lift-gate"].matched) == 1
    check_same(before, case.value(), 1e-5)  # sums in another order


@pytest.mark.null
def test_leaves_an_expert_that_is_never_used_alone() -> None:
    def forward(m, x):
        weights, experts = softmax_route(m, x)
        y = torch.zeros_like(x)
        for e in range(1, E):
            gate, up = F.linear(x, m.w_in[e]).chunk(2, -1)
            y = y + F.linear(F.silu(gate) * up, m.w_out[e]) * ((experts == e) * weights).sum(-1, keepdim=True)
        return y

    ledger = experts_case(forward).apply(LiftExperts())["lift-experts"]
    assert "do not fit the shapes of gated experts" in reasons(ledger)[0]


@pytest.mark.null
def test_a_loop_over_a_stack_names_the_stack_again() -> None:
    case = _case("unrolled")
    case.apply(LiftExperts())
    (call,) = _calls(case)
    weights = case.gm.meta["weights"]
    assert str(weights[call.w_gate_up.target]) == "w_in" and str(weights[call.w_down.target]) == "w_out"


@pytest.mark.null
def test_lifts_llama4() -> None:
    case = family_case("llama4_text")
    ledger = case.apply(LiftExperts())["lift-experts"]
    assert [m.layer for m in ledger.matched] == [1, 3] and not ledger.refused
    assert all(c.weight_on_input and c.act == "silu" and c.top_k == 1 for c in _calls(case))


@pytest.mark.null
def test_leaves_families_with_experts_alone() -> None:
    case = family_case("deepseek_v3")
    text = graph_text(case.gm)
    ledger = case.apply(LiftExperts())["lift-experts"]
    assert ledger.sites == 0 and graph_text(case.gm) == text


def _softplus(m, x):
    weights, experts = softmax_route(m, x)
    slots = experts.reshape(-1)
    h = torch.bmm(m.w_in[slots], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
    gate, up = h.chunk(2, -1)
    y = torch.bmm(m.w_out[slots], (F.softplus(gate) * up).unsqueeze(-1)).squeeze(-1)
    return (y * weights.reshape(-1, 1)).view(x.shape[0], K, -1).sum(1)


def _one_product(m, x):
    weights, experts = softmax_route(m, x)
    y = torch.bmm(m.w_in[experts.reshape(-1)], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
    return (y * weights.reshape(-1, 1)).view(x.shape[0], K, -1).sum(1)


def _best_of(m, x):
    weights, experts = softmax_route(m, x)
    slots = experts.reshape(-1)
    gate, up = torch.bmm(m.w_in[slots], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1).chunk(2, -1)
    y = torch.bmm(m.w_out[slots], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1) * weights.reshape(-1, 1)
    return y.view(x.shape[0], K, -1).amax(1)  # the larger contribution, not the sum


def _neighbour(m, x):
    """Every expert's down projection is the next one's."""
    weights, experts = softmax_route(m, x)
    slots = experts.reshape(-1)
    gate, up = torch.bmm(m.w_in[slots], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1).chunk(2, -1)
    y = torch.bmm(m.w_out[(slots + 1) % E], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1) * weights.reshape(-1, 1)
    return y.view(x.shape[0], K, -1).sum(1)


REFUSED = {
    "another activation": (_softplus, "no layout, activation and weighing"),
    "one product": (_one_product, "no value that every path"),
    "no sum": (_best_of, "no layout, activation and weighing"),
    "mixed experts": (_neighbour, "no layout, activation and weighing"),
}


@pytest.mark.null
@pytest.mark.parametrize("name", REFUSED)
def test_leaves_other_functions_alone(name: str) -> None:
    form, reason = REFUSED[name]
    case = experts_case(form)
    text = graph_text(case.gm)
    ledger = case.apply(LiftExperts())["lift-experts"]
    assert reason in reasons(ledger)[0] and not ledger.matched
    assert graph_text(case.gm) == text


@pytest.mark.null
def test_runs_twice_as_once() -> None:
    check_runs_once(LiftExperts(), experts_case(gathered))


@pytest.mark.null
def test_bad_input_raises() -> None:
    check_bad_input(LiftExperts(), experts_case(lambda m, x: experts_op(m, x, *softmax_route(m, x))))
