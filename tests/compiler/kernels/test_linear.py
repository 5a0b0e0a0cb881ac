"""The linear and dense FFN kernels for few tokens against float64."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from moec.compiler.kernels.checks import KernelArgumentError
from moec.compiler.kernels.linear import linear as lin
from moec.compiler.kernels.linear.linear import LinearProblem
from moec.compiler.kernels.mlp import gated_mlp as mlp
from moec.compiler.kernels.mlp.gated_mlp import MlpProblem

pytestmark = pytest.mark.cpu

TOKENS = (0, 1, 2, 3, 4, 7)  # every block of 4, 2 and 1 tokens, alone and after another
# one rounding of the result: 2**-9 of it; f32 sums of up to 500 products: a few 2**-24 of sum |x||w|
TOLERANCE = {"bfloat16": 2**-8, "float32": 1e-6}


def double(x):
    return None if x is None else x.double()


@pytest.mark.parametrize("bias", [None, "float32", "bfloat16"])
def test_linear(load, level, bias):
    dtypes = list(itertools.product(("float32", "bfloat16"), repeat=2))
    problems = [LinearProblem(1, 1, x, w, bias) for x, w in dtypes]
    library = load({n: f for p in problems for n, f in lin.build(p, level).items()}, level)
    for p, (length, columns) in itertools.product(problems, [(1, 1), (33, 7), (64, 8), (500, 130)]):
        w = torch.randn(columns, length).to(getattr(torch, p.weight_dtype))
        b = torch.randn(columns).to(getattr(torch, bias)) if bias else None
        for tokens in TOKENS:
            x = torch.randn(tokens, length + 1).to(getattr(torch, p.dtype))[:, 1:]
            got, want = lin.linear(library, p, x, w, b), F.linear(x.double(), w.double(), double(b))
            scale = F.linear(x.double().abs(), w.double().abs(), None if b is None else b.double().abs())
            assert ((got.double() - want).abs() <= TOLERANCE[p.dtype] * scale).all()
            assert got.dtype == x.dtype


def test_linear_can_give_float32_from_bfloat16(load, level):
    """Logits of a language model, unrounded."""
    problem = LinearProblem(64, 40, out_dtype="float32")
    library = load(lin.build(problem, level), level)
    x, w = torch.randn(2, 64).bfloat16(), torch.randn(40, 64).bfloat16()
    assert torch.allclose(lin.linear(library, problem, x, w).double(), F.linear(x.double(), w.double()), atol=1e-4)


ACTS = ("silu", "!relu2", "swigluoai@7.0@1.702")  # the others: template/test_activation.py


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gated_mlp(load, level, dtype):
    kind = getattr(torch, dtype)
    problems = [
        MlpProblem(1, 1, act, dtype, b) for act, b in zip(ACTS, [(None, None), (dtype, dtype)] * 2, strict=False)
    ]
    library = load({n: f for p in problems for n, f in mlp.build(p, level).items()}, level)
    for p, (hidden, inner) in itertools.product(problems, [(64, 48), (33, 21)]):
        act = p.activation
        w_in = (torch.randn(inner * (2 if act.gated else 1), hidden) / hidden**0.5).to(kind)
        w_out = (torch.randn(hidden, inner) / inner**0.5).to(kind)
        b_in, b_out = (
            (torch.randn(w_in.shape[0]).to(kind), torch.randn(hidden).to(kind)) if p.bias_dtypes[0] else (None,) * 2
        )
        for tokens in TOKENS:
            x = torch.randn(tokens, hidden).to(kind)
            got = mlp.gated_mlp(library, p, x, (w_in, w_out), (b_in, b_out))
            h = act(F.linear(x.double(), w_in.double(), double(b_in)))
            want = F.linear(h, w_out.double(), double(b_out))
            # h and y are rounded once each: 2**-9 of the terms and of the result, 2e-6 in float32 for erf's 1.5e-7
            tolerance = 2**-7 if dtype == "bfloat16" else 2e-6
            assert got.shape == want.shape
            assert tokens == 0 or (got.double() - want).abs().max() <= tolerance * want.abs().max()


def test_enough_work_for_all_threads(load, level):
    torch.set_num_threads(2)
    problem, ffn = LinearProblem(600, 600, "float32", "float32"), MlpProblem(600, 600, dtype="float32")
    library = load(lin.build(problem, level) | mlp.build(ffn, level), level)
    x, w = torch.randn(5, 600), torch.randn(600, 600) / 25
    assert torch.allclose(lin.linear(library, problem, x, w), F.linear(x, w), atol=1e-5)
    w_in = torch.randn(1200, 600) / 25
    gate, up = F.linear(x, w_in).chunk(2, -1)
    want = F.linear(F.silu(gate) * up, w)
    assert torch.allclose(mlp.gated_mlp(library, ffn, x, (w_in, w)), want, atol=1e-5)


def test_refusals_and_bad_arguments_name_the_reason(load, level):
    assert lin.SPECS[0].supports(LinearProblem(8, 8, "float16")) == "x in float16, only float32 and bfloat16 are built"
    assert (
        mlp.SPECS[0].supports(MlpProblem(8, 8, dtype="float64")) == "x in float64, only float32 and bfloat16 are built"
    )
    problem, ffn = LinearProblem(8, 8, "float32", "float32"), MlpProblem(8, 8, dtype="float32")
    library = load(lin.build(problem, level) | mlp.build(ffn, level), level)
    with pytest.raises(KernelArgumentError, match=r"x \(2, 8\), w \(8, 9\)"):
        lin.linear(library, problem, torch.randn(2, 8), torch.randn(8, 9))
    with pytest.raises(KernelArgumentError, match="a bias is given, or missing"):
        lin.linear(library, problem, torch.randn(2, 8), torch.randn(8, 8), torch.randn(8))
    with pytest.raises(KernelArgumentError, match="w_gate_up"):
        mlp.gated_mlp(library, ffn, torch.randn(2, 8), (torch.randn(8, 8), torch.randn(8, 8)))
