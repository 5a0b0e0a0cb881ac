"""The CUDA norms in emulation against the op."""

import pytest
import torch

from moec.compiler.kernels.cuda import rms_norm
from moec.compiler.kernels.norm.row import NormProblem
from moec.passes.ir.ops import normalise

pytestmark = pytest.mark.null

CASES = [
    (NormProblem(64), False, 0.0),
    (NormProblem(2048, cast="after_weight"), True, 1.0),
    (NormProblem(4104, centre=True), True, 0.0),
    (NormProblem(128, weight_dtype=None), False, 0.0),
]


@pytest.mark.parametrize(("problem", "with_residual", "offset"), CASES)
def test_every_norm(emulated, run, problem, with_residual, offset):
    torch.manual_seed(0)
    hidden, n = problem.hidden, 3
    kernel = emulated("norm", rms_norm.build(problem, with_residual))
    x, residual = torch.randn(n, hidden + 8).bfloat16(), torch.randn(n, hidden).bfloat16()
    weight = torch.randn(hidden).bfloat16() if problem.weight_dtype else None
    y, total = torch.empty(n, hidden).bfloat16(), torch.empty(n, hidden).bfloat16()
    values = {"x": x, "x_stride": hidden + 8, "residual": residual, "weight": weight, "y": y, "total": total}
    run(kernel, values | {"eps": 1e-5, "offset": offset, "n": n} | ({} if weight is not None else {"weight": y}))
    inputs = x[:, :hidden] + residual if with_residual else x[:, :hidden]
    want = normalise(inputs, weight, 1e-5, problem.cast, offset, problem.centre).bfloat16()
    # a sum in another order may tip one rounding: one step of bfloat16
    assert torch.allclose(y.float(), want.float(), rtol=2**-7, atol=1e-6)
    assert (y != want).float().mean() < 0.01
    if with_residual:
        assert torch.equal(total, inputs)


def test_refusals_name_the_reason():
    assert rms_norm.refusal(NormProblem(20)) == "rows of 20, not a multiple of 8 up to 32768"
    assert "float32" in str(rms_norm.refusal(NormProblem(64, dtype="float32")))
