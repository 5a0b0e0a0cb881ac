"""The gate kernels against GateSpec.apply: experts equal exactly, ties, NaN and infinities included."""

import itertools

import pytest
import torch
from gate_cases import ROUNDED, SPECS, compare, probe
from torch.nn import functional as F

from moec.compiler.kernels.checks import KernelArgumentError
from moec.compiler.kernels.gate import gate as from_logits
from moec.compiler.kernels.gate import gate_linear as fused
from moec.compiler.kernels.gate.problem import GateProblem
from moec.passes.ir.gate import GateSpec

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore:std")]


@pytest.mark.parametrize(("dtype", "names"), [("float32", tuple(SPECS)), ("bfloat16", ROUNDED)])
def test_every_gate_from_logits(load, level, dtype, names):
    problems = [
        GateProblem(spec.encode(), num_experts, dtype, None if spec.bias_on == "none" else "float32")
        for num_experts, spec in map(SPECS.__getitem__, names)
    ]
    library = load({name: f for p in problems for name, f in from_logits.build(p, level).items()}, level)
    for p, kind in itertools.product(problems, ("normal", "ties", "nan", "-inf", "large")):
        bias = torch.randn(p.num_experts) * 0.3 if p.selection_bias_dtype else None
        for tokens in (0, 1, 9):
            logits = probe(kind, tokens, p.num_experts, getattr(torch, dtype))
            got = from_logits.gate(library, p, logits, bias)
            compare(got, p.gate.apply(logits, bias), p.compute_dtype == "bfloat16" or p.result_dtype == "bfloat16")


DTYPES = [
    ("bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "bfloat16", "float32"),
    ("float32", "float32", "float32"),
    ("bfloat16", "float32", "float32"),
    ("float32", "bfloat16", "float32"),
]


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3"])
def test_the_router_and_its_gate_in_one_kernel(load, level, name):
    """Inputs with few bits, so that sums are exact in any order and ties are real."""
    num_experts, spec = SPECS[name]
    chosen_by = None if spec.bias_on == "none" else "float32"
    problems = [
        GateProblem(spec.encode(), num_experts, router, chosen_by, 100, x, w, bias)
        for (x, w, router), bias in zip(DTYPES, (None, "float32", "bfloat16", None, None), strict=True)
    ]
    library = load({n: f for p in problems for n, f in fused.build(p, level).items()}, level)
    for p, width in itertools.product(problems, (5, 100)):
        w = (torch.randint(-4, 5, (num_experts, width)) / 8).to(getattr(torch, p.weight_dtype))
        bias = (torch.randint(-4, 5, (num_experts,)) / 4).to(getattr(torch, p.bias_dtype)) if p.bias_dtype else None
        selection = torch.randn(num_experts) * 0.3 if chosen_by else None
        for tokens in (0, 1, 2, 3, 7):
            x = (torch.randint(-4, 5, (tokens, width + 1)) / 4).to(getattr(torch, p.x_dtype))[:, 1:]
            logits = F.linear(x.double(), w.double(), None if bias is None else bias.double())
            want = spec.apply(logits.float().to(getattr(torch, p.logits_dtype)), selection)
            compare(fused.gate_linear(library, p, x, w, bias, selection), want, rounded=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_enough_tokens_for_all_threads(load, level, dtype):
    """Five tasks of tokens, the last a short one; a width with whole steps and a rest."""
    torch.set_num_threads(2)
    num_experts, spec = SPECS["mixtral"]
    problem = GateProblem(spec.encode(), num_experts, hidden=270, x_dtype=dtype, weight_dtype=dtype)
    library = load(fused.build(problem, level), level)
    assert 301 * num_experts * 270 > fused.SERIAL_PRODUCTS and 4 * fused.TASK_TOKENS < 301
    x, w = ((torch.randint(-4, 5, (n, 270)) / 8).to(getattr(torch, dtype)) for n in (301, num_experts))
    want = spec.apply(F.linear(x.double(), w.double()).float())
    compare(fused.gate_linear(library, problem, x, w), want, rounded=False)


def test_refusals_name_the_reason(load, level):
    spec = GateSpec(2).encode()
    for problem, reason in (
        (GateProblem(spec, 8, "float16"), "logits in float16, only float32 and bfloat16 are built"),
        (GateProblem(spec, 1), "1 experts with top 2"),
        (GateProblem(GateSpec(2, num_groups=3).encode(), 8), "8 experts do not divide into 3 groups"),
        (GateProblem(GateSpec(2, bias_on="scores").encode(), 8), "the selection bias is missing"),
        (GateProblem(GateSpec(2, compute_dtype="float64").encode(), 8), "scores in float64, only"),
    ):
        assert from_logits.SPECS[0].supports(problem).startswith(reason)
    assert fused.SPECS[0].supports(GateProblem(spec, 8)) == "logits are given, no router to run"
    problem = GateProblem(spec, 8)
    library = load(from_logits.build(problem, level), level)
    with pytest.raises(KernelArgumentError, match="logits"):
        from_logits.gate(library, problem, torch.randn(2, 9), None)
