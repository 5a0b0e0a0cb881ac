"""The CUDA rotation in emulation against the op."""

import pytest
import torch

from moec.compiler.kernels.cuda import rope
from moec.compiler.kernels.cuda.rope import RopeProblem
from moec.passes.ir import ops

pytestmark = pytest.mark.null


@pytest.mark.parametrize("compute_dtype", ["input", "float32"])
@pytest.mark.parametrize("pairing", rope.PAIRINGS)
def test_every_pairing(emulated, run, pairing, compute_dtype):
    torch.manual_seed(0)
    problem = RopeProblem(3, 40, 32, pairing, compute_dtype)
    assert problem.refusal() is None
    fused = torch.randn(5, 3 * 40 + 16).bfloat16()  # q of a fused projection: rows with more behind them
    x, (cos, sin) = fused[:, :120].reshape(5, 3, 40), (f(torch.randn(5, 16)) for f in (torch.cos, torch.sin))
    y = torch.full((5, 3, 40), float("nan")).bfloat16()
    kernel = emulated("rope", rope.build(problem))
    run(kernel, {"x": fused, "x_stride": 136, "cos": cos, "sin": sin, "y": y, "n": 5})
    want = ops.rope(x, cos, sin, pairing, 32, compute_dtype)
    if compute_dtype == "input":
        assert torch.equal(y, want)
    else:  # the sum may be fused with a product: one rounding of float32 less, which may tip one of bfloat16
        assert torch.allclose(y.float(), want.float(), rtol=2**-7, atol=1e-6)


def test_refusals_name_the_reason():
    assert RopeProblem(2, 64, 65).refusal() == "a rotation of 65 of 64 columns"
    assert RopeProblem(2, 64, 64, "other").refusal() == "pairing 'other' computed in 'input'"
