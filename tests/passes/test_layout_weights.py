"""layout-weights: what the graph does to the shape of a weight moves into its recipe; products become aten.linear."""

from __future__ import annotations

import pytest
import torch
from passing import Case, check_bad_input, check_runs_once, check_same, family_case, function_case, reasons

from moec.passes.ir.text import graph_text
from moec.passes.ir.weights import weights_of
from moec.passes.layout_weights import LayoutWeights

aten = torch.ops.aten


def _matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _products(m, x):
    return torch.addmm(m.b, x @ m.v, m.w.t())


PRODUCTS = {"v": _matrix(8, 6), "w": _matrix(4, 6, seed=1), "b": _matrix(4, seed=2)}


@pytest.mark.null
def test_fires(golden) -> None:
    case = function_case(_products, _matrix(5, 8), **PRODUCTS)
    before, text = case.value(), graph_text(case.gm)
    ledger = case.apply(LayoutWeights())["layout-weights"]
    assert not ledger.refused
    assert case.count(aten.linear.default) == sum(n.op == "call_function" for n in case.gm.graph.nodes) == 2
    assert "w" in weights_of(case.gm), "transposing twice gives the stored tensor back, nothing is copied"
    # the same products in another order of summation: a few units of float32's last place
    check_same(before, case.value(), 1e-6)
    golden("products", text + graph_text(case.gm))


SHAPES = {
    "slice": lambda m, x: x * m.w[1:7:2].flatten()[:8],
    "select": lambda m, x: x * m.w[3],
    "transpose": lambda m, x: x * m.w.transpose(0, 1)[0, :8],
    "permute": lambda m, x: x * m.c.permute(2, 0, 1)[0, 1],
    "reshape": lambda m, x: x * m.w.reshape(8, 8).unsqueeze(0).squeeze(0)[0],
    "split": lambda m, x: x * m.w.split([3, 5], 0)[1][0] + m.w.chunk(2, 0)[1][0] + m.w.unbind(0)[2],
}


@pytest.mark.null
@pytest.mark.parametrize("shape", SHAPES)
def test_recipes_follow_every_shape_operation(shape: str) -> None:
    case = function_case(SHAPES[shape], _matrix(5, 8), w=_matrix(8, 8), c=_matrix(2, 8, 3))
    before = case.value()
    assert not case.apply(LayoutWeights())["layout-weights"].refused
    assert {str(n.target) for n in case.gm.graph.nodes if n.op == "call_function"} <= {
        "aten.mul.Tensor",
        "aten.add.Tensor",
    }
    check_same(before, case.value())


@pytest.mark.null
@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: x @ (m.w * 2), "its right operand is no stored weight"),
        (lambda m, x: x[None] @ m.c, "its weight has 3 axes"),
        (lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5), "it scales its operands"),
        (lambda m, x: torch.addmm(m.w[:1], x, m.w), "its bias is not one number per output"),
    ],
)
def test_leaves_alone_with_a_reason(forward, reason: str) -> None:
    case = function_case(forward, _matrix(5, 8), w=_matrix(8, 8), c=_matrix(1, 8, 8), b=_matrix(8))
    before = case.value()
    ledger = case.apply(LayoutWeights())["layout-weights"]
    assert reason in reasons(ledger)
    check_same(before, case.value())


@pytest.mark.null
def test_means_the_same_on_models() -> None:
    case = family_case("llama4_text")
    before = case.value()
    case.apply(LayoutWeights())
    check_same(before, case.value())


@pytest.mark.null
def test_runs_twice_as_once() -> None:
    check_runs_once(LayoutWeights(), function_case(_products, _matrix(5, 8), **PRODUCTS))


@pytest.mark.null
def test_bad_input_names_the_pass() -> None:
    case: Case = function_case(SHAPES["reshape"], _matrix(5, 8), w=_matrix(8, 8))
    check_bad_input(LayoutWeights(), case)
