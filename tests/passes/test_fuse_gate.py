"""fuse-gate: the router's product goes into the gate, through casts and views; a product that others read stays."""

from __future__ import annotations

import pytest
import torch
from gate_spellings import E, K
from moe_block import T, experts_op, gate_case, hidden, parameters
from passing import FAMILIES, Case, check_bad_input, check_runs_once, check_same, family_case, function_case, reasons
from torch.nn import functional as F

from moec.passes.fuse_gate import FuseGate
from moec.passes.ir.text import graph_text
from moec.passes.lift_experts import LiftExperts
from moec.passes.lift_gate import LiftGate

FUSED = torch.ops.moec.gate_linear.default


def _case(product, dtype: torch.dtype = torch.float32, *leading: int) -> Case:
    def forward(m, x):
        weights, experts = product(m, x).float().softmax(-1).topk(K)
        return experts_op(m, x.reshape(-1, x.shape[-1]), weights.reshape(-1, K), experts.reshape(-1, K))

    return function_case(forward, hidden(*leading, dtype=dtype), **parameters(dtype))


PRODUCTS = {
    "linear": (lambda m, x: F.linear(x, m.router), "bfloat16"),
    "linear in float32": (lambda m, x: F.linear(x.float(), m.router.float()), "float32"),
    "matrix product": (lambda m, x: x @ m.router.t(), "bfloat16"),
    "part of a stack": (lambda m, x: F.linear(x.float(), m.w_in[0, :E].float()), "float32"),
    "router bias": (lambda m, x: F.linear(x.float(), m.router.float(), m.bias), "float32"),
    "added bias": (lambda m, x: F.linear(x.float(), m.router.float()) + m.bias, "float32"),
}


@pytest.mark.null
@pytest.mark.parametrize("name", PRODUCTS)
def test_fires_on_every_product(name: str) -> None:
    product, router_dtype = PRODUCTS[name]
    case = _case(product, torch.bfloat16)
    before = case.value()
    ledger = case.apply(LiftGate(), FuseGate())["fuse-gate"]
    assert len(ledger.matched) == 1 and not ledger.refused
    (node,) = case.gm.graph.find_nodes(op="call_function", target=FUSED)
    assert node.args[5] == router_dtype and node.args[0].meta["val"].dtype == torch.bfloat16
    check_same(before, case.value(), 2**-8)  # one rounding of the bf16 sum over the experts


@pytest.mark.null
def test_fires(golden) -> None:
    case = _case(lambda m, x: F.linear(x.view(-1, x.shape[-1]), m.router), torch.float32, 1, T)
    case.apply(LiftGate(), FuseGate())
    golden("one_sequence", graph_text(case.gm))


@pytest.mark.null
@pytest.mark.parametrize("family", FAMILIES)
def test_fuses_every_gate_of_a_family(family: str) -> None:
    case = family_case(family)
    ledger = case.apply(LiftExperts(), LiftGate(), FuseGate())["fuse-gate"]
    assert not ledger.refused and len(ledger.matched) == case.count(FUSED) == case.count(torch.ops.moec.experts.default)


@pytest.mark.null
def test_leaves_logits_that_others_read_alone() -> None:
    def forward(m, x):
        logits = F.linear(x, m.router)
        weights, experts = logits.softmax(-1).topk(K)
        return experts_op(m, x, weights, experts), logits

    case = function_case(forward, hidden(), **parameters())
    ledger = case.apply(LiftGate(), FuseGate())["fuse-gate"]
    assert "read by output too" in reasons(ledger)[0]


@pytest.mark.null
def test_leaves_logits_without_a_product_alone() -> None:
    case = _case(lambda m, x: x[..., :E] * 2)
    ledger = case.apply(LiftGate(), FuseGate())["fuse-gate"]
    assert "is no product with a weight" in reasons(ledger)[0]


@pytest.mark.null
def test_leaves_a_computed_router_weight_alone() -> None:
    case = _case(lambda m, x: F.linear(x, m.router / m.router.norm(dim=-1, keepdim=True)))
    ledgers = case.apply(LiftGate(), FuseGate())
    assert len(ledgers["lift-gate"].matched) == 1
    assert "the router weight is computed by aten.div" in reasons(ledgers["fuse-gate"])[0]


@pytest.mark.null
def test_leaves_a_bias_with_its_own_rounding_alone() -> None:
    case = _case(lambda m, x: F.linear(x, m.router) + m.b_in[0, :E], torch.bfloat16)
    ledger = case.apply(LiftGate(), FuseGate())["fuse-gate"]
    assert ledger.refused and not ledger.matched


@pytest.mark.null
def test_runs_twice_as_once() -> None:
    case = gate_case("mixtral")
    case.apply(LiftGate())
    check_runs_once(FuseGate(), case)


@pytest.mark.null
def test_bad_input_raises() -> None:
    case = gate_case("mixtral")
    case.apply(LiftGate())
    check_bad_input(FuseGate(), case)
