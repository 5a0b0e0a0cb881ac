"""The CUDA gate in emulation against GateSpec.apply: experts equal exactly, ties, NaN and infinities included."""

import pytest
import torch
from gate_cases import ROUNDED, SPECS, compare, probe

from moec.compiler.kernels.cuda import gate
from moec.compiler.kernels.gate.problem import GateProblem
from moec.passes.ir.gate import GateSpec

pytestmark = [pytest.mark.null, pytest.mark.filterwarnings("ignore:std")]

CASES = [(n, "float32") for n in SPECS] + [(n, "bfloat16") for n in ROUNDED]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_every_gate(emulated, run, name, dtype):
    num_experts, spec = SPECS[name]
    problem = GateProblem(spec.encode(), num_experts, dtype, None if spec.bias_on == "none" else "float32")
    assert gate.refusal(problem) is None
    kernel = emulated("gate", gate.build(problem))
    rounded = "bfloat16" in (problem.compute_dtype, problem.result_dtype)
    bias = torch.randn(num_experts) * 0.3
    for kind in ("normal", "ties", "nan", "-inf", "large"):
        for tokens in (1, 9):
            logits = probe(kind, tokens, num_experts, getattr(torch, dtype))
            values = {"logits": logits, "n": tokens, "weights": torch.full((tokens, spec.top_k), 7.0)}
            values |= {"experts": torch.full((tokens, spec.top_k), -1, dtype=torch.int32), "selection_bias": bias}
            got = run(kernel, values)
            compare((got["weights"], got["experts"]), spec.apply(logits, bias), rounded)


def test_refusals_name_the_reason():
    spec = GateSpec(2).encode()
    assert gate.refusal(GateProblem(spec, 2048)) == "2048 experts with top 2; at most 1024 and 32"
    assert gate.refusal(GateProblem(spec, 8, "float16")).startswith("logits in float16")
    assert gate.refusal(GateProblem(spec, 8, hidden=64)) == "the router GEMM is not part of this kernel"
