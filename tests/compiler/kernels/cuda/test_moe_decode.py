"""A whole layer in one launch, in emulation: all blocks run together, meet at barriers, and give the layer's result."""

import dataclasses

import pytest
import torch
from cuda_layer import excess_error, finds, some_slow, weights

from moec.compiler.codegen.cuda_archs import architecture
from moec.compiler.codegen.emulator.emulator import EmulationError
from moec.compiler.kernels.cuda import codes, moe_decode
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem, Tile
from moec.compiler.kernels.cuda.moe_decode import DecodeProblem
from moec.compiler.kernels.gate.problem import GateProblem
from moec.passes.ir.activation import Activation
from moec.passes.ir.formats import parse_format
from moec.passes.ir.gate import GateSpec
from moec.passes.ir.quantise import dequantise_parts, quantise

pytestmark = pytest.mark.null

# h is rounded to bf16 between the GEMMs, and an f32 sum in another order may tip one rounding: 2**-8 of one of F terms
TIPPED = 1e-3
HIDDEN, INNER, EXPERTS, TOP_K, SHARED = 128, 64, 6, 2, 1


def problem_of(**changes):
    gate = GateProblem(GateSpec(TOP_K, renormalise=True).encode(), EXPERTS, hidden=HIDDEN)
    up = GemmProblem("gate_up", HIDDEN, INNER, EXPERTS + SHARED, TOP_K + SHARED)
    down = GemmProblem("down", INNER, HIDDEN, EXPERTS + SHARED, TOP_K + SHARED)
    return DecodeProblem(gate, *(dataclasses.replace(g, **changes) for g in (up, down)), SHARED, has_shared_weight=True)


PLAIN = problem_of(), Tile(16, 64, 2, 1, 2), Tile(16, 64, 2, 1, 2)
CODES = problem_of(code_bits=4, group=32, has_bias=True), Tile(16, 64, 2, 1, 2), Tile(16, 32, 2, 1, 2)
SPLIT = (
    dataclasses.replace(
        problem_of(), up=GemmProblem("gate_up", HIDDEN, 128, 7, 3), down=GemmProblem("down", 128, HIDDEN, 7, 3)
    ),
    Tile(16, 128, 2, 1, 4),
    Tile(16, 64, 3, 1, 4, splits=2),
)


def layer(problem, down_splits, num_tokens, blocks, like=None):
    """The arguments of a launch, and the layer's result in float64 with h rounded as the kernel does.

    like: experts that all tokens prefer, for ragged groups.
    """
    torch.manual_seed(num_tokens)
    slots = num_tokens * problem.up.slots_per_token
    x, router = torch.randn(num_tokens, HIDDEN).bfloat16(), weights(EXPERTS, HIDDEN)
    if like is not None:
        x[:, 0], router[like, 0] = 30.0, 2.0
    values = {"x": x, "router": router, "shared_weight": torch.rand(num_tokens), "n": num_tokens, "blocks": blocks}
    values |= {"logits": torch.full((num_tokens, EXPERTS), float("nan")), "slots": slots, "parts": slots * down_splits}
    values |= {"h": torch.full((slots, problem.up.columns), float("nan")).bfloat16()}
    values |= {"part": torch.full((slots * down_splits, HIDDEN), float("nan"))}
    values |= {"barrier": torch.zeros(2).int(), "y": torch.full((num_tokens, HIDDEN), float("nan")).bfloat16()}
    plain = []
    for name, gemm in (("up", problem.up), ("down", problem.down)):
        w = weights(gemm.num_experts, gemm.weight_rows, gemm.depth)
        values[f"{name}_w"] = w
        if gemm.code_bits:
            parts = quantise(w, parse_format(f"int{gemm.code_bits}-g{gemm.group}"))
            values[f"{name}_w"], values[f"{name}_w_scale"] = codes.pack(parts)
            w = dequantise_parts(parts)
        bias = torch.randn(gemm.num_experts, gemm.weight_rows) if gemm.has_bias else None
        values[f"{name}_bias"] = bias
        plain.append((w.double(), 0.0 if bias is None else bias.double()))
    route, experts = torch.ops.moec.gate_linear(x, router, None, None, problem.gate.spec, "float32")
    every = torch.cat([experts.long(), torch.full((num_tokens, 1), EXPERTS)], 1)
    factor = torch.cat([route, values["shared_weight"][:, None]], 1).double()
    want = torch.zeros(num_tokens, HIDDEN, dtype=torch.float64)
    (up, b_up), (down, b_down) = plain
    for t in range(num_tokens):
        for e, f in zip(every[t].tolist(), factor[t], strict=True):
            h = up[e] @ x[t].double() + (b_up[e] if problem.up.has_bias else 0.0)
            h = Activation.parse(problem.up.act)(h).bfloat16().double()
            want[t] += f * (down[e] @ h + (b_down[e] if problem.down.has_bias else 0.0))
    values |= {"weights": torch.full_like(route, float("nan")), "experts": torch.full_like(experts, -1)}
    return values, want, (route, experts)


@pytest.mark.parametrize(("problem", "up", "down"), some_slow([PLAIN, CODES, SPLIT], (0,)))
def test_a_layer_in_one_launch(emulated, run, problem, up, down):
    """One token, ragged groups, all sixteen; fewer blocks than tiles, more blocks than tiles, one block alone."""
    assert moe_decode.refusal(problem, up, down, architecture("sm_80")) is None
    kernel = emulated("moe_decode", moe_decode.build(problem, up, down))
    for num_tokens, blocks, like in ((1, 5, None), (16, 3, [1, 4]), (5, 1, None)):
        values, want, routed = layer(problem, down.splits, num_tokens, blocks, like)
        run(kernel, values, wave=0)
        assert torch.equal(values["experts"], routed[1])
        assert torch.allclose(values["weights"], routed[0], rtol=1e-4)  # logits of 60 in f32, summed in another order
        assert excess_error(values["y"], want, torch.bfloat16) < TIPPED
        assert not values["barrier"].any(), "the counters are not as the next launch needs them"


def test_blocks_that_are_not_resident_together_are_a_deadlock(emulated):
    """Why the launch is cooperative: a block that has not begun never arrives."""
    kernel = emulated("moe_decode", moe_decode.build(*PLAIN))
    values, *_ = layer(PLAIN[0], 1, 1, 2)
    with pytest.raises(EmulationError, match="deadlock, it waits for"):
        kernel.run(values, (2, 1, 1), False, 1, wave=1)


FAULTS = {
    "blocks that do not wait for the last one": (r"\(counter\) < target\)", "(counter) < target - 1)"),
    "no barrier before down": (r"moec_grid_barrier\(\(&\(barrier_ptr\[0\]\)\), \(blocks \* 2\)\);", ";"),
    "a counter that is not put back": (r"moec_count_in\(\(&\(barrier_ptr\[1\]\)\), blocks\)", "0"),
    "a ring that is filled while it is read": (
        r"(  item_ptr\w*\[0\] = .*\n)    tvm_builtin_cuda_cta_sync\(\);\n",
        r"\1",
    ),
}


@pytest.mark.parametrize("fault", some_slow(FAULTS, (0, 3)))
def test_a_planted_fault_is_found(emulated, planted, fault):
    kernel = planted(emulated("moe_decode", moe_decode.build(*PLAIN)), *FAULTS[fault])
    values, want, (_, experts) = layer(PLAIN[0], 1, 16, 3)

    def wrong(got):
        if got["barrier"].any() or not torch.equal(got["experts"], experts):
            return True
        return excess_error(got["y"], want, torch.bfloat16) > TIPPED

    assert finds(kernel, values, wrong, wave=0)


def test_refusals_name_the_reason():
    sm_80, (problem, up, down) = architecture("sm_80"), PLAIN
    e4m3 = problem_of(dtype="float8_e4m3fn")
    four = dataclasses.replace(problem, num_shared=2)
    for given, tile, reason in (
        (e4m3, up, "e4m3 rows: h would have to be rounded"),
        (four, up, "3 slots for a token, the gate gives 2"),
        (problem, Tile(32, 64, 2, 2, 1), "tiles of 32 and 16 rows for 64 and 64 threads; 16, and as many"),
        (problem, Tile(16, 48, 2, 1, 2), "64 columns, not a multiple of the tile's 24"),
    ):
        assert str(moe_decode.refusal(given, tile, down, sm_80)).startswith(reason)
