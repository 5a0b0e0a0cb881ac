"""The mma.sync GEMMs and the combine in emulation: ragged groups, empty experts, one token, idle tiles."""

import pytest
import torch
from cuda_layer import Routed, down_reference, excess_error, gate_up_reference, skewed, weights

from moec.compiler.codegen.cuda_archs import architecture
from moec.compiler.kernels.cuda import combine, gemm_mma
from moec.compiler.kernels.cuda.combine import CombineProblem
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem, Tile

pytestmark = pytest.mark.null

# beyond the rounding of the result: sums in float32, in another order; of the combine, sums of rows rounded before
SUMS = 2e-5

GATE_UP = [
    (GemmProblem("gate_up", 192, 64, 5, 3), Tile(16, 64, 3, 1, 2)),
    (GemmProblem("gate_up", 256, 128, 5, 3, has_bias=True, act="swigluoai@7.0@1.702"), Tile(32, 128, 4, 2, 2)),
    (GemmProblem("gate_up", 128, 64, 5, 3, act="!relu2"), Tile(16, 64, 2, 1, 4)),
    (GemmProblem("gate_up", 128, 128, 5, 3, act="gelu_tanh"), Tile(64, 128, 3, 2, 4)),
]


@pytest.mark.parametrize(("problem", "tile"), GATE_UP)
@pytest.mark.parametrize("num_tokens", [1, 37])
def test_gate_up(emulated, run, problem, tile, num_tokens):
    torch.manual_seed(0)
    assert tile.refusal(problem, architecture("sm_80")) is None
    kernel = emulated("gate_up", gemm_mma.build(problem, tile))
    routed = Routed(skewed(num_tokens, 4, 2, empty=[2]), 4, 1, tile.rows)
    x, w = torch.randn(num_tokens, problem.depth).bfloat16(), weights(5, problem.weight_rows, problem.depth)
    bias = torch.randn(5, problem.weight_rows) if problem.has_bias else None
    y = torch.full((len(routed.slot_order), problem.columns), float("nan")).bfloat16()
    run(kernel, routed.values() | {"x": x, "w": w, "bias": bias, "y": y, "x_rows": num_tokens})
    want = gate_up_reference(problem, routed, x, w, bias)
    assert excess_error(y, want, torch.bfloat16) < SUMS


DOWN = [
    (GemmProblem("down", 192, 64, 5, 3, has_bias=True), Tile(16, 64, 3, 1, 4)),
    (GemmProblem("down", 320, 128, 5, 3, has_bias=True), Tile(16, 64, 3, 1, 2, splits=3)),
    (GemmProblem("down", 128, 128, 5, 3, part_dtype="bfloat16"), Tile(64, 128, 2, 2, 2)),
]


@pytest.mark.parametrize(("problem", "tile"), DOWN)
@pytest.mark.parametrize("num_tokens", [1, 29])
def test_down_and_combine(emulated, run, problem, tile, num_tokens):
    """The last expert is held elsewhere: its slots have no row, and add nothing."""
    torch.manual_seed(0)
    assert tile.refusal(problem, architecture("sm_80")) is None
    down = emulated("down", gemm_mma.build(problem, tile))
    experts = skewed(num_tokens, 4, 2, empty=[1])
    routed = Routed(experts, 4, 1, tile.rows)
    slots = len(routed.slot_order)
    h, w = torch.randn(slots, problem.depth).bfloat16(), weights(5, problem.columns, problem.depth)
    bias = torch.randn(5, problem.columns) if problem.has_bias else None
    part = torch.full((slots * tile.splits, problem.columns), float("nan"), dtype=getattr(torch, problem.part_dtype))
    run(down, routed.values() | {"x": h, "w": w, "bias": bias, "y": part, "x_rows": slots})
    want = down_reference(routed, h, w, bias)
    got = part.view(tile.splits, slots, -1).double().sum(0)
    assert excess_error(got, want, part.dtype) < SUMS

    sums = CombineProblem(problem.columns, 3, 2, 1, tile.splits, problem.part_dtype, has_shared_weight=True)
    route_weights, shared_weight = torch.rand(num_tokens, 2), torch.rand(num_tokens)
    y = torch.full((num_tokens, problem.columns), float("nan")).bfloat16()
    values = {"part": part, "weights": route_weights, "experts": experts, "shared_weight": shared_weight, "y": y}
    run(emulated("combine", combine.build(sums)), values | {"n": num_tokens})
    factor = torch.cat([route_weights * (experts < 3), shared_weight[:, None]], 1).double()
    by_slot = got.view(num_tokens, 3, -1)
    assert excess_error(y, (factor[..., None] * by_slot).sum(1), torch.bfloat16) < SUMS


@pytest.mark.parametrize("mode", ["gate_up", "down"])
def test_e4m3(emulated, run, mode):
    """Values that e4m3 holds, so that the reference needs no rounding; scales of rows and of weight rows."""
    torch.manual_seed(0)
    problem = GemmProblem(mode, 256, 64, 4, 2, dtype="float8_e4m3fn")
    tile = Tile(16, 64, 3, 1, 2, splits=1 if mode == "gate_up" else 2)
    assert tile.refusal(problem, architecture("sm_89")) is None
    kernel = emulated(mode, gemm_mma.build(problem, tile), "sm_89")
    routed = Routed(skewed(19, 4, 2), 4, 0, tile.rows)
    x_rows = 19 if mode == "gate_up" else 38
    x, w = (torch.randn(s).to(torch.float8_e4m3fn) for s in ((x_rows, 256), (4, problem.weight_rows, 256)))
    x_scale, w_scale = torch.rand(x_rows), torch.rand(4, problem.weight_rows) / 16
    y = torch.full((38 * tile.splits, 64), float("nan"), dtype=torch.bfloat16 if mode == "gate_up" else torch.float32)
    values = {"x": x, "w": w, "x_scale": x_scale, "w_scale": w_scale, "y": y, "x_rows": x_rows}
    run(kernel, routed.values() | values)
    plain_x, plain_w = x.double() * x_scale[:, None], w.double() * w_scale[..., None]
    if mode == "gate_up":
        want = gate_up_reference(problem, routed, plain_x, plain_w)
    else:
        want = down_reference(routed, plain_x, plain_w)
        y = y.view(2, 38, -1).sum(0)
    assert excess_error(y, want, y.dtype) < SUMS


def test_refusals_name_the_reason():
    sm_80, sm_89 = architecture("sm_80"), architecture("sm_89")
    problem = GemmProblem("gate_up", 256, 128, 4, 2)
    for given, tile, arch, reason in (
        (GemmProblem("gate_up", 200, 128, 4, 2), Tile(), sm_80, "a depth of 200, not a multiple of 64; pad"),
        (GemmProblem("gate_up", 256, 128, 4, 2, dtype="float16"), Tile(), sm_80, "float16 weights, only"),
        (GemmProblem("gate_up", 256, 128, 4, 2, dtype="float8_e4m3fn"), Tile(), sm_80, "sm_80 has no mma.sync"),
        (GemmProblem("gate_up", 256, 96, 4, 2), Tile(), sm_80, "96 columns, not a multiple of the tile's 64"),
        (problem, Tile(rows=24), sm_80, "24 x 64 does not divide among 1 x 4 warps"),
        (problem, Tile(splits=2), sm_80, "gate_up with split K"),
        (GemmProblem("down", 128, 128, 4, 2), Tile(splits=3), sm_80, "3 splits of 2 steps"),
        (problem, Tile(128, 128, 4, 2, 2), sm_89, "131072 bytes of shared memory, a block on sm_89 has 101376"),
    ):
        assert str(tile.refusal(given, arch)).startswith(reason)
