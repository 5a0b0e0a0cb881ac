"""The experts kernels of every instruction set against float64, on the shapes and routings that reach every path."""

import dataclasses
import itertools

import pytest
import torch
from experts_layer import LONG, ODD, SMALL

from moec.compiler.kernels.checks import KernelArgumentError
from moec.compiler.kernels.experts.catalogue import AMX_BF16, AVX2_FMA, AVX512_BF16, AVX512F, SPECS
from moec.compiler.kernels.experts.dispatch import COUNTER_BACK, COUNTER_FRONT
from moec.compiler.kernels.experts.plan import COUNTERS
from moec.runtime.launch.cpu_features import LEVELS

pytestmark = pytest.mark.cpu

BF16 = [AMX_BF16, AVX512_BF16, AVX512F, AVX2_FMA]
F32 = [AVX512F, AVX2_FMA]
CASES = [(m, "bfloat16") for m in BF16] + [(m, "float32") for m in F32]
IDS = [f"{m.level}-{d}" for m, d in CASES]

kernels = pytest.mark.parametrize(("kernel", "dtype"), CASES, ids=IDS)


def _with(problem, dtype):
    return dataclasses.replace(problem, dtype=dtype)


def _one_expert(layer, num_tokens, expert):
    """Inputs that send `num_tokens` rows to one expert (and to its neighbour where K is 2)."""
    x, weights, experts, shared = layer.inputs(num_tokens)
    experts = torch.full_like(experts, expert)
    for k in range(1, experts.shape[1]):
        experts[:, k] = (expert + k) % layer.problem.num_experts
    return x, weights, experts, shared


@kernels
def test_every_row_count_of_a_block(make_layer, kernel, dtype):
    """1 to 49 rows per expert: each exact tile and register height, one to three blocks, tails of 1 and 2."""
    layer = make_layer(kernel, _with(ODD, dtype))
    for num_tokens in (*range(1, 35), 40, 48, 49):
        layer.check(*_one_expert(layer, num_tokens, expert=3))


@kernels
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 5, 16, 63, 200])
def test_random_routing(make_layer, kernel, dtype, num_tokens):
    layer = make_layer(kernel, _with(ODD, dtype))
    x, weights, experts, shared = layer.inputs(num_tokens)
    if num_tokens == 0:
        assert layer.run(x, weights, experts, shared).shape == (0, ODD.hidden)
    else:
        layer.check(x, weights, experts, shared)


@kernels
def test_chunks_of_k_and_units_of_rows(make_layer, kernel, dtype):
    """An inner width and row counts beyond what is done at a time, without a gate, weights on the input."""
    layer = make_layer(kernel, _with(LONG, dtype))
    plan = kernel.plan(layer.problem)
    assert plan.down_depth_chunk < plan.depth_down and plan.down_rows < 300
    layer.check(*layer.inputs(7))
    layer.check(*_one_expert(layer, 300, expert=1))


@pytest.mark.parametrize(
    ("kernel", "unit_rows"), [(AMX_BF16, 48), (AVX512_BF16, 24), (AVX2_FMA, 12)], ids=["amx", "avx512", "avx2"]
)
def test_more_rows_than_a_unit(make_layer, kernel, unit_rows):
    """gate_up cuts a segment into units of rows: shrink the cache budget until 100 rows are several."""
    blocking = dataclasses.replace(kernel.blocking, l2_bytes=64 * 32 * 2, task_bytes=4096)
    kernel = dataclasses.replace(kernel, blocking=blocking)
    assert kernel.plan(SMALL).unit_rows == unit_rows
    layer = make_layer(kernel, dataclasses.replace(SMALL, num_shared=1))
    for num_tokens in (13, 25, 31, 33, 37, 47, 48, 49, 73, 100):
        layer.check(*_one_expert(layer, num_tokens, expert=0))


@pytest.mark.parametrize("kernel", [AVX512_BF16, AVX2_FMA], ids=["avx512", "avx2"])
def test_blocks_of_a_segment_differ_by_one_row(make_layer, kernel):
    """On vector registers a short step takes as long as one of half the rows: of 49 rows none has less than 9."""
    layer, plan = make_layer(kernel, SMALL), kernel.plan(SMALL)
    for num_tokens in (1, plan.blocking.block_rows, 13, 24, 25, 49, 100):
        x, weights, experts, _ = _one_expert(layer, num_tokens, expert=3)
        workspace = torch.empty(plan.workspace_bytes(num_tokens), dtype=torch.uint8)
        packed = (layer.packed.w_gate_up, layer.packed.w_down)
        layer.library[kernel.symbol(SMALL)](x, weights, experts.int(), *packed, workspace, torch.empty_like(x))
        offsets, _ = plan.offsets(num_tokens)
        count = -(-num_tokens // plan.blocking.block_rows)
        starts, sizes = (
            workspace[offsets[name] :].view(torch.int32)[: count + 1].tolist() for name in ("block_row", "block_rows")
        )
        assert starts[0] == 0 and starts[count] == num_tokens == sum(sizes[:count])  # the next expert's first row
        assert [b - a for a, b in itertools.pairwise(starts)] == sizes[:count]
        assert max(sizes[:count]) - min(sizes[:count]) <= 1


def test_more_tokens_than_a_pass(make_layer):
    """5000 tokens go through in two passes of at most 4096 over the same workspace."""
    layer = make_layer(AMX_BF16, ODD)
    layer.check(*layer.inputs(5000))
    assert AMX_BF16.plan(ODD).workspace_bytes(5000) == AMX_BF16.plan(ODD).workspace_bytes(4096)


@kernels
def test_unaligned_and_strided_inputs(make_layer, kernel, dtype):
    """Views one element off any alignment, and every second row and column of a larger tensor."""
    layer = make_layer(kernel, _with(ODD, dtype))
    x, weights, experts, shared = layer.inputs(9)
    expected = layer.run(x, weights, experts, shared)

    def off_by_one(t):
        flat = torch.zeros(t.numel() + 1, dtype=t.dtype)
        flat[1:] = t.reshape(-1)
        return flat[1:].view(t.shape)

    def strided(t):
        wide = torch.zeros([2 * n for n in t.shape], dtype=t.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
        view.copy_(t)
        return view

    for change in (off_by_one, strided):
        given = [change(t) for t in (x, weights, experts, shared)]
        assert torch.equal(layer.run(*given), expected)


@kernels
def test_threads_do_not_change_a_bit(make_layer, kernel, dtype):
    layer = make_layer(kernel, _with(ODD, dtype))
    given = layer.inputs(70)
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        results.append(layer.run(*given))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_threads_begin_at_both_ends(make_layer):
    """With shared experts and many tokens; the counters say who took how many tasks, and the result is the same."""
    problem = dataclasses.replace(SMALL, hidden=512, inner=512, num_shared=1)
    kernel = dataclasses.replace(AVX512_BF16, blocking=dataclasses.replace(AVX512_BF16.blocking, task_bytes=1))
    layer = make_layer(kernel, problem)
    plan, p = kernel.plan(problem), layer.packed
    x, weights, experts, _ = layer.inputs(2048)  # work for long enough that other threads wake up
    before = torch.get_num_threads()

    def run(num_threads):
        torch.set_num_threads(num_threads)
        workspace, y = torch.empty(plan.workspace_bytes(len(x)), dtype=torch.uint8), torch.empty_like(x)
        layer.library[kernel.symbol(problem)](x, weights, experts.int(), p.w_gate_up, p.w_down, workspace, y)
        counters = workspace[: 4 * COUNTERS.stop].view(torch.int32)
        return y, counters[COUNTER_FRONT].item(), counters[COUNTER_BACK].item()

    alone, *taken = run(1)
    units = sum(-(-rows // plan.unit_rows) for rows in (*experts.flatten().bincount().tolist(), len(x)))
    assert taken == [plan.up_groups * units, 0]
    for _ in range(100):
        y, front, back = run(4)
        assert torch.equal(y, alone) and front + back == taken[0]
        if back:
            break
    torch.set_num_threads(before)
    assert back
    assert layer.error(alone, layer.reference(x, weights, experts)) < 4e-3


@kernels
def test_experts_that_are_not_held_add_nothing(make_layer, kernel, dtype):
    """Indices outside [0, E) are slots of another device; those rows get the shared experts alone."""
    layer = make_layer(kernel, _with(ODD, dtype))
    x, weights, experts, shared = layer.inputs(6)
    experts[1] = layer.problem.num_experts + 3
    experts[2, 0] = -1
    held = torch.where(experts < 0, layer.problem.num_experts + 99, experts)
    y = layer.run(x, weights, experts, shared)
    assert layer.error(y, layer.reference(x, weights, held, shared)) < 4e-3


@kernels
def test_nan_stays_in_its_row(make_layer, kernel, dtype):
    layer = make_layer(kernel, _with(ODD, dtype))
    x, weights, experts, shared = layer.inputs(40)
    clean = layer.run(x, weights, experts, shared)
    x[7, 3] = torch.nan
    weights[11, 0] = torch.nan
    y = layer.run(x, weights, experts, shared)
    assert y[7].isnan().all() and y[11].isnan().all()
    others = [t for t in range(40) if t not in (7, 11)]
    assert torch.equal(y[others], clean[others])


def test_arguments_are_checked(make_layer):
    layer = make_layer(AMX_BF16, SMALL)
    x, weights, experts, _ = layer.inputs(3)
    for given, message in (
        ((x[:, :-1], weights, experts), r"x is \(3, 63\), expected \[T,64\]"),
        ((x.float(), weights, experts), "x is torch.float32, expected bfloat16"),
        ((x, weights[:2], experts), r"weights are \(2, 2\), expected \(3, 2\)"),
        ((x, weights, experts[:, :1]), r"experts are \(3, 1\), expected \(3, 2\)"),
        ((x, weights, experts, torch.ones(3)), "shared_weight is given"),
    ):
        with pytest.raises(KernelArgumentError, match=message):
            layer.run(*given)


def test_refusals_say_why():
    def reason(spec, **changes):
        return spec.refusal(dataclasses.replace(SMALL, **changes), frozenset(LEVELS["amx_bf16"]))

    amx, _, avx512f, avx2 = SPECS[:4]
    assert reason(amx) is None
    assert reason(amx, dtype="float32") == "dtype float32, the kernel has bfloat16"
    assert reason(avx512f, dtype="float32") is None
    assert "unknown activation 'mish'" in reason(avx2, act="mish")
    assert reason(avx2, act="!swigluoai@7.0@1.702") == "activation '!swigluoai@7.0@1.702' needs a gate"
    assert "empty layer" in reason(avx2, inner=0)
    assert "no shared expert" in reason(avx2, has_shared_weight=True)
    assert amx.refusal(SMALL, frozenset(LEVELS["avx2"])).startswith("needs amx_bf16, the processor lacks amx_bf16")


def test_cost_counts_the_experts_that_tokens_touch():
    cost = AMX_BF16.spec().cost
    expert = 3 * SMALL.hidden * SMALL.inner
    assert cost(SMALL, 0).num_flops == 0 and cost(SMALL, 0).num_bytes == 0
    assert cost(SMALL, 1).num_flops == 2 * 2 * expert
    assert cost(SMALL, 1).num_bytes == 2 * 2 * expert + 2 * SMALL.hidden * 2
    assert cost(SMALL, 10**6).num_bytes == 8 * 2 * expert + 2 * 10**6 * SMALL.hidden * 2
