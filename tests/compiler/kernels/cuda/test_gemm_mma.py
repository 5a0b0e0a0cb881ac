"""The mma.sync GEMMs and the combine in emulation: ragged groups, empty experts, one token, idle tiles."""

import pytest
import torch
from cuda_layer import Routed, down_reference, excess_error, gate_up_reference, skewed, weights

from moec.compiler.codegen.cuda_archs import architecture
from moec.compiler.kernels.cuda import combine, combine_fast, gemm_mma
from moec.compiler.kernels.cuda.combine import CombineProblem
from moec.compiler.kernels.cuda.combine_fast import FinishProblem
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


def test_atomic_combine(emulated):
    """Rows added to their token's sum by atomics; the sums end as bf16 and as zeros, as the second call finds them.

    Blocks run together, threads in two orders: the order of the additions differs, and so do last bits of the sums.
    """
    torch.manual_seed(0)
    problem = GemmProblem("down", 128, 64, 4, 3, has_bias=True, reduce=True, num_shared=1, has_shared_weight=True)
    tile, num_tokens = Tile(16, 64, 2, 1, 2, splits=2), 9
    assert tile.refusal(problem, architecture("sm_80")) is None
    down = emulated("down", gemm_mma.build(problem, tile))
    finish = emulated("finish", combine_fast.build(FinishProblem(64)))
    experts = skewed(num_tokens, 4, 2)  # the routed experts are 0 .. 2: some slots are held elsewhere
    routed = Routed(experts, 3, 1, tile.rows)
    h, w, bias = torch.randn(27, 128).bfloat16(), weights(4, 64, 128), torch.randn(4, 64)
    route_weights, shared_weight = torch.rand(num_tokens, 2), torch.rand(num_tokens)
    factor = torch.cat([route_weights * (experts < 3), shared_weight[:, None]], 1).double()
    by_slot = torch.zeros(27, 64, dtype=torch.float64)
    for row, (e, slot) in enumerate(zip(routed.slot_expert().tolist(), routed.slot_order.tolist(), strict=False)):
        by_slot[slot] = w[e].double() @ h[row].double() + bias[e].double()
    want = (factor[..., None] * by_slot.view(num_tokens, 3, 64)).sum(1)
    sums, y = torch.zeros(num_tokens, 64), torch.full((num_tokens, 64), float("nan")).bfloat16()
    values = routed.values() | {"x": h, "w": w, "bias": bias, "y": sums, "x_rows": 27, "n": num_tokens}
    values |= {"weights": route_weights, "shared_weight": shared_weight}
    for lazy, seed in ((False, 1), (True, 2)):
        down.run(values, down.source.grid_of(values), lazy, seed, wave=0)
        assert excess_error(sums, want, torch.float32) < SUMS
        ended = {"sums": sums, "y": y, "n": num_tokens}
        finish.run(ended, finish.source.grid_of(ended), lazy, seed)
        assert excess_error(y, want, torch.bfloat16) < SUMS
        assert not sums.any()


def test_rows_that_were_weighted_before(emulated, run):
    """weight_on_input: gate_up on rows that lie in slot_order already, the sum without weights."""
    torch.manual_seed(0)
    problem, tile = GemmProblem("gate_up", 128, 32, 3, 2, in_slot_order=True), Tile(16, 64, 2, 1, 2)
    routed = Routed(skewed(7, 3, 2), 3, 0, tile.rows)
    rows, w = torch.randn(14, 128).bfloat16(), weights(3, 64, 128)
    y = torch.full((14, 32), float("nan")).bfloat16()
    values = routed.values() | {"x": rows, "w": w, "y": y, "x_rows": 14}
    run(emulated("gate_up", gemm_mma.build(problem, tile)), values)
    by_row = Routed(routed.experts, 3, 0, tile.rows)
    by_row.slot_order = torch.arange(14, dtype=torch.int32) * 2
    assert excess_error(y, gate_up_reference(problem, by_row, rows, w), torch.bfloat16) < SUMS
    part, summed = torch.randn(14, 32), torch.empty(7, 32).bfloat16()
    plain = CombineProblem(32, 3, 2, weighted=False)
    run(emulated("combine", combine.build(plain)), {"part": part, "experts": routed.experts, "y": summed, "n": 7})
    assert excess_error(summed, part.double().view(7, 2, 32).sum(1), torch.bfloat16) < SUMS


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
