"""The router's products and the gate in one CUDA kernel, in emulation against moec::gate_linear."""

import pytest
import torch
from cuda_layer import some_slow
from gate_cases import SPECS, compare

from moec.compiler.kernels.cuda import gate_linear
from moec.compiler.kernels.gate.problem import GateProblem
from moec.passes.ir.gate import GateSpec

pytestmark = pytest.mark.null


def inputs(problem, num_tokens):
    """Numbers whose products and sums f32 holds exactly in any order: logits are equal bit for bit."""
    x = torch.randint(-8, 9, (num_tokens, problem.hidden)).bfloat16()
    w = (torch.randint(-8, 9, (problem.num_experts, problem.hidden)) / 64).to(getattr(torch, problem.weight_dtype))
    bias = (
        torch.randint(-8, 9, (problem.num_experts,)).to(getattr(torch, problem.bias_dtype))
        if problem.bias_dtype
        else None
    )
    return x, w, bias


CASES = [
    ("softmax", GateProblem(GateSpec(6, renormalise=True).encode(), 40, hidden=264)),
    ("bias and bf16", GateProblem(GateSpec(2).encode(), 8, "bfloat16", hidden=64, bias_dtype="bfloat16")),
    ("f32 weight", GateProblem(GateSpec(4, score="sigmoid").encode(), 64, hidden=512, weight_dtype="float32")),
]


@pytest.mark.parametrize(("name", "problem"), some_slow(CASES, (1,)))
def test_it_is_the_op(emulated, run, name, problem):
    torch.manual_seed(0)
    assert gate_linear.refusal(problem) is None
    kernel = emulated("gate_linear", gate_linear.build(problem))
    top_k = problem.gate.top_k
    for num_tokens in (1, 5):
        x, w, bias = inputs(problem, num_tokens)
        values = {"x": x, "w": w, "bias": bias, "logits": torch.full((num_tokens, problem.num_experts), float("nan"))}
        values |= {
            "arrived": torch.zeros(num_tokens, dtype=torch.int32),
            "weights": torch.full((num_tokens, top_k), 7.0),
        }
        values |= {"experts": torch.full((num_tokens, top_k), -1, dtype=torch.int32), "n": num_tokens}
        for wave in (1, 0):  # blocks one after another, and all together
            got = run(kernel, values, wave)
            args = (x, w, bias, None, problem.spec, problem.logits_dtype)
            compare(
                (got["weights"], got["experts"]), torch.ops.moec.gate_linear(*args), problem.logits_dtype == "bfloat16"
            )
            assert not got["arrived"].any(), "the counters are not as the next launch needs them"


def test_a_selection_bias(emulated, run):
    torch.manual_seed(0)
    num_experts, spec = next((n, s) for n, s in SPECS.values() if s.bias_on == "scores")
    problem = GateProblem(spec.encode(), num_experts, selection_bias_dtype="float32", hidden=128)
    x, w, _ = inputs(problem, 3)
    chosen_by = torch.randn(num_experts) * 0.3
    values = {"x": x, "w": w, "selection_bias": chosen_by, "logits": torch.empty(3, num_experts), "n": 3}
    values |= {"arrived": torch.zeros(3, dtype=torch.int32), "weights": torch.empty(3, spec.top_k)}
    values |= {"experts": torch.empty(3, spec.top_k, dtype=torch.int32)}
    got = run(emulated("gate_linear", gate_linear.build(problem)), values)
    want = torch.ops.moec.gate_linear(x, w, None, chosen_by, problem.spec, "float32")
    compare((got["weights"], got["experts"]), want, False)


def test_refusals_name_the_reason():
    spec = GateSpec(2).encode()
    assert gate_linear.refusal(GateProblem(spec, 8)) == "rows of 0, not a multiple of 8"
    assert (
        gate_linear.refusal(GateProblem(spec, 8, hidden=64, x_dtype="float32"))
        == "x in float32; only bfloat16 is built"
    )
    assert gate_linear.refusal(GateProblem(spec, 2048, hidden=64)) == "2048 experts with top 2; at most 1024 and 32"
