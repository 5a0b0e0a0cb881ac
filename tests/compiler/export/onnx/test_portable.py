"""The function bodies of portable experts nodes mean what moec::experts means."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx_graphs import run

from moec.compiler.export.onnx.portable import DOMAIN, Form, function
from moec.passes.ir import ops

pytestmark = pytest.mark.cpu
TOLERANCE = 2e-6  # float32 sums in another order
ACTIVATIONS = [
    "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "identity", "silu@0.5", "swigluoai@0.5@1.702",
    "f32:softcapglu@7.0@9.0", "f32:silu", "!relu2", "!silu",
]  # fmt: skip


def case(act: str, bias: bool, tokens: int = 7) -> dict[str, torch.Tensor]:
    """T tokens, H 16, F 12, E 5, K 2; an index of E is "not held here"."""
    torch.manual_seed(1)
    rows = 12 if act.startswith("!") else 24
    chosen = torch.stack([torch.randperm(6)[:2] for _ in range(tokens)]).int()
    given = {"x": torch.randn(tokens, 16), "weights": torch.rand(tokens, 2), "experts": chosen}
    given |= {"w_in": torch.randn(5, rows, 16), "w_out": torch.randn(5, 16, 12)}
    return given | ({"b_in": torch.randn(5, rows), "b_out": torch.randn(5, 16)} if bias else {})


def check(form: Form, given: dict[str, torch.Tensor]) -> None:
    (found,) = run(
        lambda b, *x: b.op(form.name, *x, domain=DOMAIN, act=form.act, num_experts=5, top_k=2),
        [given[name] for name in form.inputs],
        [function(form, 21)],
    )
    x, weights, chosen, w_in, w_out = (given[n] for n in ("x", "weights", "experts", "w_in", "w_out"))
    biases = given.get("b_in"), given.get("b_out")
    expected = ops.experts(x, weights, chosen, w_in, w_out, *biases, None, form.act, 0, form.weight_on_input)
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max() + 1e-3)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_activations(act: str, bias: bool) -> None:
    check(Form(act, bias, bias, weight_on_input=False), case(act, bias))


def test_weight_on_input() -> None:
    check(Form("silu", False, False, weight_on_input=True), case("silu", False))


def test_one_token_and_no_expert_held() -> None:
    given = case("silu", False, tokens=1)
    check(Form("silu", False, False, False), given)
    given["experts"] = torch.tensor([[5, 7]], dtype=torch.int32)
    check(Form("silu", False, False, False), given)


def test_all_tokens_to_one_expert() -> None:
    given = case("silu", True)
    given["experts"] = torch.tensor([[4, 5]] * 7, dtype=torch.int32)
    check(Form("silu", True, True, False), given)


def test_every_body_passes_the_checker_and_has_a_name_of_its_own() -> None:
    forms = [Form(a, b, b, w) for a in ACTIVATIONS for b in (False, True) for w in (False, True)]
    for form in forms:
        onnx.checker.check_function(function(form, 21))
    assert len({form.name for form in forms}) == len(forms)
