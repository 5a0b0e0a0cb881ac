"""Gathering and quantising rows in emulation."""

import pytest
import torch
from cuda_layer import Routed, skewed, some_slow

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


@pytest.mark.parametrize(("dtype", "block"), some_slow([("int8", 0), ("int8", 128), ("float8_e4m3fn", 128)], (1,)))
def test_codes_and_blocks(emulated, run, dtype, block):
    """Scales for a row or for 128 values; a block of zeros has scale 1."""
    torch.manual_seed(0)
    x, width = torch.randn(3, 384).bfloat16(), block or 384
    x[1, 128:256] = 0
    codes, scale = torch.empty(3, 384, dtype=getattr(torch, dtype)), torch.empty(3, 384 // width)
    problem = RowsProblem(384, quantise=True, dtype=dtype, block=block)
    values = run(emulated("rows", rows.build(problem)), {"x": x, "y": codes, "scale": scale, "x_rows": 3, "rows": 3})
    blocks = x.float().view(3, -1, width)
    want = blocks.abs().amax(2) / rows.LARGEST[dtype]
    want = torch.where(want == 0, torch.ones(()), want)
    assert torch.equal(values["scale"], want)
    ratio = blocks / want[..., None]
    rounded = ratio.round() if dtype == "int8" else ratio.to(torch.float8_e4m3fn).float()
    assert torch.equal(values["y"].float().view_as(ratio), rounded)


def test_weight_on_input(emulated, run):
    """Rows times the weight of their slot, rounded once, as moec::grouped_gemm does before it multiplies."""
    torch.manual_seed(0)
    routed = Routed(skewed(5, 4, 2), 4, 1, 16)
    n, x, y = len(routed.slot_order), torch.randn(5, 64).bfloat16(), torch.empty(15, 64).bfloat16()
    weights, shared = torch.rand(5, 2), torch.rand(5)
    problem = RowsProblem(64, 3, weighted=True, num_shared=1, has_shared_weight=True)
    values = {"x": x, "slot_order": routed.slot_order, "weights": weights, "shared_weight": shared, "y": y}
    run(emulated("rows", rows.build(problem)), values | {"x_rows": 5, "rows": n})
    factor = torch.cat([weights, shared[:, None]], 1).reshape(-1)[routed.slot_order.long()]
    assert torch.equal(y, (x[routed.slot_order.long() // 3] * factor[:, None]).bfloat16())


def test_nan_is_not_hidden(emulated, run):
    x = torch.zeros(1, 512).bfloat16()
    x[0, 300] = float("nan")
    values = {"x": x, "y": torch.empty(1, 512, dtype=torch.float8_e4m3fn), "scale": torch.empty(1)}
    run(emulated("rows", rows.build(RowsProblem(512, quantise=True))), values | {"x_rows": 1, "rows": 1})
    assert values["scale"].isnan().all()


def test_refusals_name_the_reason():
    assert RowsProblem(20, 2).refusal() == "rows of 20, not a multiple of 8 up to 32768"
    assert str(RowsProblem(96, quantise=True, block=128).refusal()).startswith("float8_e4m3fn in blocks of 128 of 96")
    assert RowsProblem(64, weighted=True).refusal() == "weights without a gather: a row has no slot"
    assert RowsProblem(64).refusal() == "nothing to do: neither a gather nor a quantisation"
