"""fuse-gate-up: a dense gated FFN becomes one op; its activation is named by evaluation."""

from __future__ import annotations

import pytest
import torch
from passing import check_bad_input, check_runs_once, check_same, family_case, function_case, reasons
from torch.nn import functional as F

from moec.passes.drop_batch_axis import DropBatchAxis
from moec.passes.fold_views import FoldViews
from moec.passes.fuse_gate_up import FuseGateUp
from moec.passes.infra.errors import PassError
from moec.passes.ir.text import graph_text
from moec.passes.ir.weights import weights_of

MLP = torch.ops.moec.gated_mlp.default


def _matrix(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 3


WEIGHTS = {"g": _matrix(6, 8, seed=0), "u": _matrix(6, 8, seed=1), "d": _matrix(8, 6, seed=2), "b": _matrix(6, seed=3)}
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "silu spelled out": lambda x: x * torch.sigmoid(x),
}


def _ffn(act):
    return lambda m, x: F.linear(act(F.linear(x, m.g)) * F.linear(x, m.u), m.d)


@pytest.mark.null
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_fires_and_names_the_activation(name: str) -> None:
    case = function_case(_ffn(ACTIVATIONS[name]), torch.randn(5, 8), **WEIGHTS)
    before = case.value()
    ledger = case.apply(FuseGateUp())["fuse-gate-up"]
    assert [m.detail for m in ledger.matched] == [name.split()[0]] and case.count(MLP) == 1
    # one product of twice the width instead of two: a few units of float32's last place
    check_same(before, case.value(), 2e-6)


@pytest.mark.null
def test_golden(golden) -> None:
    case = function_case(_ffn(F.silu), torch.randn(5, 8), **WEIGHTS)
    text = graph_text(case.gm)
    case.apply(FuseGateUp())
    golden("silu", text + graph_text(case.gm))


@pytest.mark.null
def test_up_before_gate_biases_and_float32() -> None:
    def forward(m, x):
        up = F.linear(x, m.u, m.b)
        gate = F.linear(x, m.g, m.b)
        return F.linear((F.silu(gate.float()) * up.float()).to(x.dtype), m.d)

    narrow = {k: v.to(torch.bfloat16) for k, v in WEIGHTS.items()}
    case = function_case(forward, torch.randn(5, 8).to(torch.bfloat16), **narrow)
    before = case.value()
    assert [m.detail for m in case.apply(FuseGateUp())["fuse-gate-up"].matched] == ["f32:silu"]
    (node,) = case.gm.graph.find_nodes(op="call_function", target=MLP)
    joined = weights_of(case.gm)[str(node.args[1].target)]
    assert [str(w) for w in joined.inputs] == ["g", "u"], "the gate half comes first, whichever is computed first"
    check_same(before, case.value(), 2**-7)  # bf16: one rounding


@pytest.mark.null
@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: F.linear(F.silu(F.linear(x, m.g)) * F.linear(x.neg(), m.u), m.d), "read different inputs"),
        (lambda m, x: F.linear(F.silu(F.linear(x, m.g, m.b)) * F.linear(x, m.u), m.d), "has a bias"),
        (lambda m, x: F.linear(F.silu(F.linear(x, m.g * 2)) * F.linear(x, m.u), m.d), "is computed in the graph"),
        (lambda m, x: F.linear(torch.tanh(F.linear(x, m.g)) * F.linear(x, m.u), m.d), "equals no known activation"),
        (
            lambda m, x: F.linear(F.silu(F.linear(x, m.g)) * (u := F.linear(x, m.u)), m.d).sum() + u,
            "read elsewhere too",
        ),
    ],
)
def test_leaves_alone_with_a_reason(forward, reason: str) -> None:
    case = function_case(forward, torch.randn(5, 8), **WEIGHTS)
    before = case.value()
    ledger = case.apply(FuseGateUp())["fuse-gate-up"]
    assert not ledger.matched and len(ledger.refused) == 1 and reason in reasons(ledger)[0]
    check_same(before, case.value())


@pytest.mark.null
@pytest.mark.parametrize(
    ("family", "sites"), [("deepseek_v3", 3), ("qwen2_moe", 3), ("llama4_text", 4), ("mixtral", 0)]
)
def test_means_the_same_on_models(family: str, sites: int) -> None:
    case = family_case(family)
    case.prepare(DropBatchAxis(), FoldViews())
    before = case.value()
    ledger = case.apply(FuseGateUp())["fuse-gate-up"]
    assert len(ledger.matched) == sites and not ledger.refused
    check_same(before, case.value(), 1e-5)


@pytest.mark.null
def test_runs_twice_as_once() -> None:
    check_runs_once(FuseGateUp(), family_case("deepseek_v3"))


@pytest.mark.null
def test_bad_input_names_the_pass() -> None:
    check_bad_input(FuseGateUp(), function_case(_ffn(F.silu), torch.randn(5, 8), **WEIGHTS))


@pytest.mark.null
def test_swapped_gate_and_up_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.passes.fuse_gate_up.recognise", lambda ffn: ("silu", True))
    with pytest.raises(PassError, match=r"pass fuse-gate-up: layer \d"):
        family_case("deepseek_v3").apply(FuseGateUp())
