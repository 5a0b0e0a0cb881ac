"""The function bodies of portable experts nodes mean what moec::experts means."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx_graphs import run

from moec.compiler.export.onnx.codes import laid_out
from moec.compiler.export.onnx.portable import DOMAIN, Form, function
from moec.passes.ir import ops
from moec.passes.ir.formats import parse_format
from moec.passes.ir.quantise import dequantise_parts, quantise

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


def check(form: Form, given: dict[str, torch.Tensor], numbers: dict[str, torch.Tensor] | None = None) -> None:
    """numbers: what the case means, where it is given as codes."""
    (found,) = run(
        lambda b, *x: b.op(form.name, *x, domain=DOMAIN, act=form.act, num_experts=5, top_k=2),
        [given[name] for name in form.inputs],
        [function(form, 21)],
    )
    agrees(found, form, numbers or given)


def agrees(found: torch.Tensor, form: Form, given: dict[str, torch.Tensor]) -> None:
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


def coded(given: dict[str, torch.Tensor], form: Form) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The case with its stacks as codes, and with the numbers that the codes mean."""
    assert form.format is not None
    stored, numbers = dict(given), dict(given)
    for stack in ("in", "out"):
        parts = [quantise(w, form.format) for w in given[f"w_{stack}"]]
        numbers[f"w_{stack}"] = torch.stack([dequantise_parts(p) for p in parts])
        for name, letter in (("codes", "w"), ("scales", "s"), ("zeros", "z")):
            made = [laid_out(p, False).get(name) for p in parts]
            stored |= {f"{letter}_{stack}": torch.stack(made)} if made[0] is not None else {}
    return stored, numbers


FORMATS = ["int8", "int8-asym", "int8-g16", "int4-g16", "int4-g32-asym", "int2-g16", "int2-g32-asym"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_codes(name: str, bias: bool) -> None:
    """H 96, F 96: with groups of 32 three zeros, so that the last byte of a row of them is not full."""
    format = parse_format(name)
    form = Form("silu", bias, bias, False, format)
    given = case("silu", bias)
    given |= {"x": torch.randn(7, 96), "w_in": torch.randn(5, 192, 96), "w_out": torch.randn(5, 96, 96)}
    given |= {"b_in": torch.randn(5, 192), "b_out": torch.randn(5, 96)} if bias else {}
    stored, numbers = coded(given, form)
    check(form, stored, numbers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stacks_of_half_the_width(dtype: torch.dtype) -> None:
    given = case("silu", False)
    numbers = given | {name: given[name].to(dtype).float() for name in ("w_in", "w_out")}
    form = Form("silu", False, False, False, narrow=True)

    def emit(b, x, weights, chosen, w_in, w_out):
        w_in, w_out = b.cast(w_in, dtype), b.cast(w_out, dtype)  # numpy has no bfloat16 to feed
        return b.op(form.name, x, weights, chosen, w_in, w_out, domain=DOMAIN, act="silu", num_experts=5, top_k=2)

    (found,) = run(emit, [numbers[name] for name in form.inputs], [function(form, 21)])
    agrees(found, form, numbers)


def test_every_body_passes_the_checker_and_has_a_name_of_its_own() -> None:
    forms = [Form(a, b, b, w) for a in ACTIVATIONS for b in (False, True) for w in (False, True)]
    forms += [Form("silu", b, b, False, parse_format(name)) for name in FORMATS for b in (False, True)]
    forms.append(Form("silu", False, False, False, None, narrow=True))
    for form in forms:
        onnx.checker.check_function(function(form, 21))
    assert len({form.name for form in forms}) == len(forms)
