"""The TMA and wgmma GEMMs in emulation: ragged groups, empty experts, one token, few blocks and many tiles."""

import pytest
import torch
from cuda_layer import Routed, down_reference, excess_error, gate_up_reference, skewed, weights

from moec.compiler.codegen.cuda_archs import architecture
from moec.compiler.kernels.cuda import gemm_wgmma
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem
from moec.compiler.kernels.cuda.gemm_wgmma import ROWS, WgmmaTile

pytestmark = pytest.mark.null
SUMS = 2e-5  # beyond the rounding of the result: sums in float32, in another order


@pytest.mark.parametrize("num_tokens", [1, 170])
def test_gate_up(emulated, run, num_tokens):
    torch.manual_seed(0)
    problem, tile = GemmProblem("gate_up", 320, 64, 4, 2), WgmmaTile(32, 3)
    assert tile.refusal(problem, architecture("sm_90a")) is None
    kernel = emulated("gate_up", gemm_wgmma.build(problem, tile), "sm_90a", tile.boxes(problem))
    routed = Routed(skewed(num_tokens, 4, 2, empty=[1]), 4, 0, ROWS)
    x, w = torch.randn(num_tokens, problem.depth).bfloat16(), weights(4, problem.weight_rows, problem.depth)
    by_slot = x[routed.slot_order.long() // 2]
    y = torch.full((len(by_slot), problem.columns), float("nan")).bfloat16()
    run(kernel, routed.values() | {"x": by_slot, "w": w, "y": y, "x_rows": len(by_slot), "blocks": 3})
    assert excess_error(y, gate_up_reference(problem, routed, x, w), torch.bfloat16) < SUMS


def test_down(emulated, run):
    torch.manual_seed(0)
    problem, tile = GemmProblem("down", 128, 96, 3, 2, has_bias=True), WgmmaTile(48, 2)
    kernel = emulated("down", gemm_wgmma.build(problem, tile), "sm_90a", tile.boxes(problem))
    routed = Routed(skewed(90, 3, 2), 3, 0, ROWS)
    h, w = torch.randn(180, problem.depth).bfloat16(), weights(3, problem.columns, problem.depth)
    bias, y = torch.randn(3, problem.columns), torch.full((180, problem.columns), float("nan"))
    run(kernel, routed.values() | {"x": h, "w": w, "bias": bias, "y": y, "x_rows": 180, "blocks": 1})
    assert excess_error(y, down_reference(routed, h, w, bias), torch.float32) < SUMS


def test_e4m3(emulated, run):
    """Values that e4m3 holds, so that the reference needs no rounding."""
    torch.manual_seed(0)
    problem, tile = GemmProblem("gate_up", 256, 32, 3, 2, dtype="float8_e4m3fn"), WgmmaTile(16, 2)
    kernel = emulated("gate_up", gemm_wgmma.build(problem, tile), "sm_90a", tile.boxes(problem))
    routed = Routed(skewed(70, 3, 2), 3, 0, ROWS)
    x, w = (torch.randn(s).to(torch.float8_e4m3fn) for s in ((140, 256), (3, 64, 256)))
    x_scale, w_scale = torch.rand(140), torch.rand(3, 64) / 16
    y = torch.full((140, 32), float("nan")).bfloat16()
    values = {"x": x, "w": w, "x_scale": x_scale, "w_scale": w_scale, "y": y, "x_rows": 140, "blocks": 2}
    run(kernel, routed.values() | values)
    by_slot = GemmProblem("gate_up", 256, 32, 3, 2)
    identity = Routed(routed.experts, 3, 0, ROWS)
    identity.slot_order = torch.arange(140, dtype=torch.int32) * 2  # rows of x are in the order of slots already
    want = gate_up_reference(by_slot, identity, x.double() * x_scale[:, None], w.double() * w_scale[..., None])
    assert excess_error(y, want, torch.bfloat16) < SUMS


def test_refusals_name_the_reason():
    problem = GemmProblem("gate_up", 256, 256, 4, 2)
    for tile, arch, reason in (
        (WgmmaTile(), "sm_89", "sm_89 has no wgmma"),
        (WgmmaTile(96), "sm_90a", "256 columns, not a multiple of the tile's 96"),
        (WgmmaTile(256), "sm_90a", "256 columns, not a multiple of 8 with 2 accumulators within 256"),
        (WgmmaTile(128, 5), "sm_90a", "245840 bytes of shared memory, a block has 232448"),
    ):
        assert tile.refusal(problem, architecture(arch)) == reason
