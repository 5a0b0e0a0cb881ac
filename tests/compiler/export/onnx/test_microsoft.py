"""com.microsoft.MoE, as it is written, means what moec::experts means; what it cannot mean is refused."""

from __future__ import annotations

import pytest
import torch
from onnx_graphs import run

from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.onnx.microsoft import activation_attributes, as_logits
from moec.passes.ir import ops
from moec.passes.ir.gate import GateSpec

pytestmark = pytest.mark.cpu
TOLERANCE = 5e-6  # weights go through log and exp


def stacks(act: str) -> tuple[torch.Tensor, torch.Tensor]:
    """E 6, F 12, H 16: canonical w_in and w_out."""
    torch.manual_seed(2)
    return torch.randn(6, 12 if act.startswith("!") else 24, 16), torch.randn(6, 16, 12)


def in_turn(w: torch.Tensor, act: str) -> torch.Tensor:
    return w if act.startswith("!") else w.view(6, 2, 12, 16).transpose(1, 2).reshape(6, 24, 16)


def moe(b, x, logits, w_in, w_out, act: str, k: int):
    attributes = activation_attributes(act).attributes()
    return b.op(
        "MoE", x, logits, w_in, None, w_out, domain="com.microsoft", k=k, normalize_routing_weights=1,
        **attributes,
    )  # fmt: skip


@pytest.mark.parametrize("act", ["silu", "silu@0.5", "swigluoai@0.5@1.702", "!relu", "!silu", "!identity"])
def test_any_weights_go_in_as_logits(act: str) -> None:
    w_in, w_out = stacks(act)
    x, weights = torch.randn(9, 16), torch.rand(9, 2) * 3
    chosen = torch.stack([torch.randperm(8)[:2] for _ in range(9)]).long()  # 6 and 7 are not held here
    weights[0] = 0.0

    def emit(b, x, weights, chosen, w_in, w_out):
        logits, total = as_logits(b, weights, chosen, 6)
        return b.op("Mul", moe(b, x, logits, w_in, w_out, act, 2), total)

    (found,) = run(emit, [x, weights, chosen, in_turn(w_in, act), w_out])
    expected = ops.experts(x, weights, chosen, w_in, w_out, None, None, None, act)
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def test_equal_logits_do_not_go_to_the_lowest_expert() -> None:
    """Why the gate stands in the graph: should this fail, ONNX Runtime's own routing has become usable."""
    w_in, w_out = stacks("silu")
    x, logits = torch.randn(40, 16), torch.randn(40, 6).round()
    (found,) = run(lambda b, *v: moe(b, *v, act="silu", k=2), [x, logits, in_turn(w_in, "silu"), w_out])
    weights, chosen = GateSpec(2, renormalise=True).apply(logits)
    expected = ops.experts(x, weights, chosen, w_in, w_out, None, None, None, "silu")
    assert float((found - expected).abs().max()) > 0.1 * float(expected.abs().max())


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "relu2", "f32:softcapglu@7.0@9.0", "!relu2", "!gelu"])
def test_other_activations_are_refused(act: str) -> None:
    with pytest.raises(ExportError, match="--experts portable"):
        activation_attributes(act)
