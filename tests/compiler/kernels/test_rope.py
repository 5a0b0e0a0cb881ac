"""The RoPE kernel against the plain op: in bfloat16 bit by bit, since both round at the same places."""

import itertools

import pytest
import torch

from moec.compiler.kernels.checks import KernelArgumentError
from moec.compiler.kernels.rope.rope import SPECS, RopeProblem, build, rope
from moec.passes.ir import ops

pytestmark = pytest.mark.cpu

WIDTHS = [(128, 128), (80, 20), (16, 6), (48, 32)]  # whole; partial with 2, 1 and 16 lanes and every kind of tail


def angles(tokens, pairs):
    a = torch.randn(tokens, pairs) * 10
    return a.cos(), a.sin()


@pytest.mark.parametrize(("dtype", "widths"), [("float32", WIDTHS[1:]), ("bfloat16", WIDTHS)])
def test_rope_of_queries_and_keys_equals_the_op(load, level, dtype, widths):
    kinds = itertools.product(widths, ("half", "interleaved", "deinterleaved"), ("input", "float32"))
    problems = [RopeProblem(d, r, dtype, "float32", pairing, c, two=True) for (d, r), pairing, c in kinds]
    library = load({name: f for p in problems for name, f in build(p, level).items()}, level)
    for p in problems:
        for tokens in (0, 1, 5):
            fused = torch.randn(tokens, 9, p.head_dim).to(getattr(torch, dtype))
            qk = (fused[:, :6], fused[:, 6:8])
            cos, sin = angles(tokens, p.rotary_dim // 2)
            for x, got in zip(qk, rope(library, p, qk, cos, sin), strict=True):
                want = ops.rope(x, cos, sin, p.pairing, p.rotary_dim, p.compute_dtype)
                if dtype == "bfloat16":
                    assert torch.equal(got, want)
                else:  # a fused multiply-add rounds once where the op rounds twice
                    assert torch.allclose(got, want, rtol=0, atol=1e-6)


def test_one_tensor_with_one_row_of_angles_for_all_tokens(load, level):
    torch.set_num_threads(2)
    problem = RopeProblem(32, 32, "bfloat16", "bfloat16")
    library = load(build(problem, level), level)
    x = torch.randn(300, 4, 32).bfloat16()  # enough for all threads
    cos, sin = (a.bfloat16().expand(300, 16) for a in angles(1, 16))
    (got,) = rope(library, problem, (x,), cos, sin)
    assert torch.equal(got, ops.rope(x, cos, sin, "half", 32))


def test_refusals_and_bad_arguments_name_the_reason(load, level):
    assert SPECS[0].supports(RopeProblem(16, 18)) == "rotary_dim 18 is odd or does not fit into head_dim 16"
    assert SPECS[0].supports(RopeProblem(16, 16, compute_dtype="float64")) == "computing in float64 is not built"
    problem = RopeProblem(16, 16, "float32")
    library = load(build(problem, level), level)
    with pytest.raises(KernelArgumentError, match="2 tensors given"):
        rope(library, problem, (torch.randn(1, 1, 16),) * 2, *angles(1, 8))
    with pytest.raises(KernelArgumentError, match="x has shape"):
        rope(library, problem, (torch.randn(1, 1, 8),), *angles(1, 8))
