"""Every kind of gate in ONNX Runtime gives the experts of GateSpec.apply exactly and its weights to rounding."""

from __future__ import annotations

import pytest
import torch
from gate_cases import SPECS, compare, probe
from onnx_graphs import run

from moec.compiler.export.onnx.gate import emit_gate

pytestmark = pytest.mark.cpu
# no kernel for bfloat16 scores in ONNX Runtime's CPU provider: such models are exported in float32
CASES = {n: case for n, case in SPECS.items() if case[1].compute_dtype != "bfloat16"}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["normal", "ties", "large"])
def test_gate(name: str, kind: str) -> None:
    torch.manual_seed(0)
    num_experts, spec = CASES[name]
    if kind == "large" and (spec.score == "sigmoid" or spec.transform == "tanh_cap"):
        pytest.skip("near 1, torch's and ONNX Runtime's sigmoid and tanh round to other ties")
    logits = probe(kind, 33, num_experts, torch.float32)
    bias = torch.randn(num_experts) if spec.bias_on != "none" else None
    given = [logits] if bias is None else [logits, bias]
    found = run(lambda b, x, extra=None: emit_gate(b, spec, x, torch.float32, extra), given)
    compare(found, spec.apply(logits, bias), rounded=False)
