"""Gathering and quantising rows in emulation."""

import pytest
import torch
from cuda_layer import Routed, skewed

from moec.compiler.kernels.cuda import rows
from moec.compiler.kernels.cuda.rows import RowsProblem

pytestmark = pytest.mark.null


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("width", [64, 2056])
def test_gather(emulated, run, width, quantise):
    torch.manual_seed(0)
    routed = Routed(skewed(5, 4, 2), 4, 1, 16)
    n, x = len(routed.slot_order), torch.randn(5, width).bfloat16()
    x[3] = 0
    y = torch.empty(n, width, dtype=torch.float8_e4m3fn if quantise else torch.bfloat16)
    values = {"x": x, "slot_order": routed.slot_order, "y": y, "scale": torch.empty(n), "x_rows": 5, "rows": n}
    run(emulated("rows", rows.build(RowsProblem(width, 3, quantise))), values)
    want = x[routed.slot_order.long() // 3]
    if not quantise:
        assert torch.equal(y, want)
        return
    scale = want.float().abs().amax(1) / 448
    assert torch.equal(values["scale"], torch.where(scale == 0, torch.ones(()), scale))
    # torch rounds to e4m3 as the instruction does
    assert torch.equal(y.float(), (want.float() / values["scale"][:, None]).to(torch.float8_e4m3fn).float())


def test_nan_is_not_hidden(emulated, run):
    x = torch.zeros(1, 512).bfloat16()
    x[0, 300] = float("nan")
    values = {"x": x, "y": torch.empty(1, 512, dtype=torch.float8_e4m3fn), "scale": torch.empty(1)}
    run(emulated("rows", rows.build(RowsProblem(512, quantise=True))), values | {"x_rows": 1, "rows": 1})
    assert values["scale"].isnan().all()


def test_refusals_name_the_reason():
    assert RowsProblem(20, 2).refusal() == "rows of 20, not a multiple of 8 up to 32768"
    assert RowsProblem(64).refusal() == "nothing to do: neither a gather nor a quantisation"
