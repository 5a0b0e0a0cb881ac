"""The int4 and int8 GEMMs in emulation: every group size, ragged groups, empty experts, one token, idle tiles."""

import dataclasses

import pytest
import torch
from cuda_layer import Routed, down_reference, excess_error, finds, gate_up_reference, skewed, some_slow, weights

from moec.compiler.codegen.cuda_archs import architecture
from moec.compiler.kernels.cuda import codes, gemm_codes, split_activation
from moec.compiler.kernels.cuda.codes import CodesError
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem, Tile
from moec.compiler.kernels.cuda.split_activation import SplitActivationProblem
from moec.passes.ir.formats import parse_format
from moec.passes.ir.quantise import dequantise_parts, quantise

pytestmark = pytest.mark.null

# beyond the rounding of the result: codes are exact in bf16, products and scales are f32, in another order
SUMS = 2e-5

GATE_UP = [
    ("int4-g32", GemmProblem("gate_up", 192, 64, 5, 3), Tile(16, 64, 3, 1, 2)),
    ("int8", GemmProblem("gate_up", 128, 64, 5, 3, has_bias=True, act="swigluoai@7.0@1.702"), Tile(32, 64, 2, 2, 2)),
    ("int4-g128", GemmProblem("gate_up", 384, 128, 5, 3), Tile(128, 128, 3, 2, 4)),
    ("int4-g64", GemmProblem("gate_up", 320, 128, 5, 3, act="!relu2"), Tile(16, 128, 4, 1, 4)),
    ("int8-g64", GemmProblem("gate_up", 192, 64, 5, 3), Tile(64, 128, 3, 2, 2)),
]
DOWN = [
    ("int8", GemmProblem("down", 192, 128, 5, 3), Tile(16, 128, 2, 1, 4, splits=3)),
    ("int4-g128", GemmProblem("down", 384, 64, 5, 3, has_bias=True), Tile(16, 64, 3, 1, 2, splits=2)),
    ("int4-g32", GemmProblem("down", 128, 128, 5, 3, part_dtype="bfloat16"), Tile(128, 128, 3, 2, 4)),
]


def packed(name, problem):
    """-> the problem with its codes, its arguments w and w_scale, and the numbers that they mean, f32[E, N, K]."""
    parts = quantise(weights(problem.num_experts, problem.weight_rows, problem.depth), parse_format(name))
    w, w_scale = codes.pack(parts)
    bits, group = codes.code_bits_and_group(name, problem.depth)
    coded = dataclasses.replace(problem, code_bits=bits, group=group)
    return coded, {"w": w, "w_scale": w_scale}, dequantise_parts(parts)


@pytest.mark.parametrize(("name", "problem", "tile"), some_slow(GATE_UP, (0,)))
def test_gate_up(emulated, run, name, problem, tile):
    torch.manual_seed(0)
    problem, stored, w = packed(name, problem)
    assert tile.refusal(problem, architecture("sm_80")) is None
    kernel = emulated("gate_up", gemm_codes.build(problem, tile))
    for num_tokens in (1, 37):
        routed = Routed(skewed(num_tokens, 4, 2, empty=[2]), 4, 1, tile.rows)
        x = torch.randn(num_tokens, problem.depth).bfloat16()
        bias = torch.randn(5, problem.weight_rows) if problem.has_bias else None
        y = torch.full((len(routed.slot_order), problem.columns), float("nan")).bfloat16()
        run(kernel, routed.values() | stored | {"x": x, "bias": bias, "y": y, "x_rows": num_tokens})
        assert excess_error(y, gate_up_reference(problem, routed, x, w, bias), torch.bfloat16) < SUMS


@pytest.mark.parametrize(("name", "problem", "tile"), some_slow(DOWN, (0,)))
def test_down(emulated, run, name, problem, tile):
    torch.manual_seed(0)
    problem, stored, w = packed(name, problem)
    assert tile.refusal(problem, architecture("sm_80")) is None
    kernel = emulated("down", gemm_codes.build(problem, tile))
    for num_tokens in (1, 29):
        routed = Routed(skewed(num_tokens, 4, 2, empty=[1]), 4, 1, tile.rows)
        slots = len(routed.slot_order)
        h, bias = torch.randn(slots, problem.depth).bfloat16(), torch.randn(5, problem.columns)
        bias = bias if problem.has_bias else None
        part = torch.full(
            (slots * tile.splits, problem.columns), float("nan"), dtype=getattr(torch, problem.part_dtype)
        )
        run(kernel, routed.values() | stored | {"x": h, "bias": bias, "y": part, "x_rows": slots})
        got = part.view(tile.splits, slots, -1).double().sum(0)
        assert excess_error(got, down_reference(routed, h, w, bias), part.dtype) < SUMS


def test_split_gate_up(emulated, run):
    """gate_up with split K: partial sums, then bias and activation; rows held elsewhere are left alone."""
    torch.manual_seed(0)
    whole = GemmProblem("gate_up", 256, 32, 4, 3, act="swigluoai@7.0@1.702", has_bias=True)
    problem = GemmProblem("gate_up_part", 256, 64, 4, 3)
    problem, stored, w = packed("int4-g64", problem)
    tile = Tile(16, 64, 2, 1, 2, splits=3)
    gemm = emulated("gate_up_part", gemm_codes.build(problem, tile))
    after = SplitActivationProblem(32, 3, whole.act, 4, has_bias=True)
    finish = emulated("split_activation", split_activation.build(after))
    for num_tokens in (1, 21):
        routed = Routed(skewed(num_tokens, 3, 2, empty=[0]), 3, 1, tile.rows)
        slots = len(routed.slot_order)
        x, bias = torch.randn(num_tokens, 256).bfloat16(), torch.randn(4, 64)
        part, h = torch.full((slots * 3, 64), float("nan")), torch.full((slots, 32), float("nan")).bfloat16()
        run(gemm, routed.values() | stored | {"x": x, "y": part, "x_rows": num_tokens})
        run(finish, routed.values() | {"part": part, "bias": bias, "h": h})
        assert excess_error(h, gate_up_reference(whole, routed, x, w, bias), torch.bfloat16) < SUMS


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_lies_where_its_lane_looks(bits):
    """The layout, value by value, from the PTX ISA's fragment: lane, register and half of each (row, k)."""
    parts = quantise(torch.randn(2, 32, 128), parse_format("int4-g64" if bits == 4 else "int8"))
    w, scale = codes.pack(parts)
    assert w.shape == (2, 2, 2, 32 * bits) and w.dtype == torch.int32
    assert scale.shape == ((2, 2, 32) if bits == 4 else (2, 32))
    for row, k in ((0, 0), (1, 3), (7, 63), (8, 64), (19, 77), (31, 127), (13, 42)):
        half, lane = row % 16 // 8, row % 8 * 4 + k % 8 // 2
        k16, register, parity = k % 64 // 16, k % 16 // 8, k % 2
        if bits == 4:
            word, shift = lane * 4 + half * 2 + k16 // 2, 16 * parity + 4 * (k16 % 2 * 2 + register)
        else:
            word, shift = half * 128 + lane * 4 + k16, 16 * parity + 8 * register
        stored = int(w[1, row // 16, k // 64, word]) >> shift & ((1 << bits) - 1)
        code = int(parts.codes[1, row, k])
        assert stored == (code + 8 if bits == 4 else code & 0xFF)


FAULTS = {
    "what is taken away from a code": (r"0xc308c308", "0xc309c309"),
    "a nibble that belongs to the next pair": (r"moec_codes_4\(words_ptr\[0\], 4\)", "moec_codes_4(words_ptr[0], 8)"),
    "scales of the other group": (r"\+ v_(\d+)\) \+ 4224\)", r"+ v_\1) + 4096)"),
    "a wait for one group too few": (r"cp\.async\.wait_group 1", "cp.async.wait_group 2"),
}


@pytest.mark.parametrize("fault", some_slow(FAULTS, (1, 3)))
def test_a_planted_fault_is_found(emulated, planted, fault):
    torch.manual_seed(0)
    name, problem, tile = GATE_UP[0]
    problem, stored, w = packed(name, problem)
    kernel = planted(emulated("gate_up", gemm_codes.build(problem, tile)), *FAULTS[fault])
    routed, x = Routed(skewed(5, 4, 2), 4, 1, tile.rows), torch.randn(5, problem.depth).bfloat16()
    y = torch.full((15, problem.columns), float("nan")).bfloat16()
    values = routed.values() | stored | {"x": x, "y": y, "x_rows": 5}
    want = gate_up_reference(problem, routed, x, w)
    assert finds(kernel, values, lambda got: excess_error(got["y"], want, torch.bfloat16) > SUMS)


def test_refusals_name_the_reason():
    sm_80 = architecture("sm_80")
    for problem, tile, reason in (
        (GemmProblem("down", 256, 64, 4, 2, code_bits=3), Tile(16, 64, 3, 1, 2), "codes of 3 bits in groups of 0"),
        (
            GemmProblem("down", 192, 64, 4, 2, code_bits=4, group=128),
            Tile(16, 64, 3, 1, 2),
            "a depth of 192, not a mul",
        ),
        (GemmProblem("down", 256, 32, 4, 2, code_bits=4), Tile(16, 32, 3, 1, 4), "16 x 32 does not divide among 1 x 4"),
        (GemmProblem("down", 256, 32, 4, 2, code_bits=4), Tile(32, 32, 3, 2, 2), "32 weight rows are no whole number"),
    ):
        assert str(tile.refusal(problem, sm_80)).startswith(reason)
    with pytest.raises(
        CodesError, match=r"int4-g32-asym weights; packed are int4 and int8 .*; choose another --weights"
    ):
        codes.pack(quantise(torch.randn(16, 64), parse_format("int4-g32-asym")))
    assert codes.refusal(parse_format("int8"), 24, 64) == "weights of 24 x 64, not multiples of 16 x 64"
