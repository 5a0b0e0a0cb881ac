"""The cached-attention kernel against the plain op in float64."""

import pytest
import torch

from moec.compiler.kernels.attention.cached_attention import SPECS, AttentionProblem, build, cached_attention
from moec.compiler.kernels.checks import KernelArgumentError
from moec.passes.ir import ops

pytestmark = pytest.mark.cpu

NUM_SLOTS, LENGTH = 4, 100
SHAPES = [  # GQA; MQA with whole odd vectors; heads narrower than a vector with tails; V narrower than K
    (8, 2, 64, 64, "float32"),
    (6, 1, 80, 80, "bfloat16"),
    (5, 5, 20, 12, "float32"),
    (4, 2, 48, 32, "bfloat16"),
    (3, 3, 32, 48, "bfloat16"),  # a query head of its own for each kv head, in whole vectors
]
# float32: sums of 100 products; bfloat16: the result's rounding, 2**-9 of values up to 4
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-6}


def batch(mode):
    """slots and positions of a ragged batch."""
    if mode == "decode":
        return [2, 0, 3], [70, 0, 33]
    if mode == "prefill":  # two sequences, one that goes on; long enough to be split into tasks and blocks
        return [1] * 40 + [3] * 45, [*range(40), *range(10, 55)]
    if mode == "mixed":
        return [1, 1, 1, 0, 2, 2, 3], [97, 98, 99, 5, 63, 64, 0]
    return [], []


def run(library, problem, mode, window=0, chunk=0, softcap=0.0, by_head=False):
    """-> the largest error of the result, after the caches were found equal."""
    slots, positions = (torch.tensor(x, dtype=torch.long) for x in batch(mode))
    heads, kv_heads, d, dv = problem.num_heads, problem.num_kv_heads, problem.head_dim, problem.value_dim
    kind, cache_kind = getattr(torch, problem.dtype), getattr(torch, problem.cache_dtype)
    fused = torch.randn(len(slots), heads + 2 * kv_heads, max(d, dv) + 1).to(kind)  # slices: strided and unaligned
    q, k, v = fused[:, :heads, :d], fused[:, heads : heads + kv_heads, 1 : d + 1], fused[:, heads + kv_heads :, :dv]
    caches = [torch.randn(NUM_SLOTS, LENGTH, kv_heads, width).to(cache_kind) for width in (d, dv)]
    if by_head:  # as engines keep them: the entries of a head follow each other in memory
        caches = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in caches]
    sinks = torch.randn(heads) if problem.sinks_dtype else None
    wide = [c.double() for c in caches]
    rest = (slots, positions, sinks, d**-0.5, window, chunk, softcap)
    got = cached_attention(library, problem, (q, k, v), tuple(caches), *rest)
    # the cache rounds what is written
    want = ops.cached_attention(q.double(), k.to(cache_kind).double(), v.to(cache_kind).double(), *wide, *rest)
    for cache, expected in zip(caches, wide, strict=True):
        assert torch.equal(cache.double(), expected)
    assert got.dtype == kind and got.shape == want.shape
    return 0.0 if got.numel() == 0 else float((got.double() - want).abs().max())


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "value_dim", "dtype"), SHAPES)
def test_attention_equals_the_op(load, level, heads, kv_heads, head_dim, value_dim, dtype):
    plain = AttentionProblem(heads, kv_heads, head_dim, value_dim, dtype, dtype)
    library = load(build(plain, level), level)
    for mode in ("decode", "prefill", "mixed", "empty"):
        for window, chunk in ((0, 0), (7, 0), (0, 16), (40, 0)):
            assert run(library, plain, mode, window, chunk) <= TOLERANCE[dtype]
        assert run(library, plain, mode, by_head=True) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sinks_and_capped_scores(load, level, dtype):
    problem = AttentionProblem(4, 2, 32, 32, dtype, dtype, sinks_dtype="float32", softcap=True)
    library = load(build(problem, level), level)
    for mode in ("decode", "prefill", "mixed", "empty"):
        for window, chunk in ((0, 0), (7, 0), (0, 16)):
            assert run(library, problem, mode, window, chunk, softcap=20.0) <= TOLERANCE[dtype]


def test_tasks_of_several_threads(load, level):
    """Decode with several heads per task and a prompt with several tokens per task."""
    torch.set_num_threads(2)
    problem = AttentionProblem(12, 6, 64, 64, "float32", "float32")
    library = load(build(problem, level), level)
    for mode in ("decode", "prefill", "mixed"):
        assert run(library, problem, mode) <= TOLERANCE["float32"]


def test_a_bfloat16_cache_under_float32_activations(load, level):
    problem = AttentionProblem(4, 2, 32, 32, "float32", "bfloat16")
    library = load(build(problem, level), level)
    assert run(library, problem, "mixed") <= TOLERANCE["float32"]


def test_a_nan_key_reaches_only_the_queries_that_see_it(load, level):
    problem = AttentionProblem(2, 1, 16, 16, "float32", "float32")
    library = load(build(problem, level), level)
    caches = torch.randn(2, 1, 8, 1, 16)
    caches[0, 0, 3] = float("nan")
    positions = torch.tensor([2, 4])
    qkv = torch.randn(2, 2, 16), torch.randn(2, 1, 16), torch.randn(2, 1, 16)
    out = cached_attention(
        library, problem, qkv, tuple(caches), torch.zeros(2, dtype=torch.long), positions, None, 0.25
    )
    assert not out[0].isnan().any() and out[1].isnan().all()


def test_large_scores_do_not_overflow(load, level):
    problem = AttentionProblem(1, 1, 16, 16, "float32", "float32")
    library = load(build(problem, level), level)
    caches = tuple(torch.randn(2, 1, 40, 1, 16))
    qkv = torch.full((1, 1, 16), 1e4), torch.full((1, 1, 16), 1e4), torch.ones(1, 1, 16)
    out = cached_attention(library, problem, qkv, caches, torch.tensor([0]), torch.tensor([39]), None, 1.0)
    assert torch.equal(out, torch.ones(1, 1, 16))  # the new key beats all others by far


def test_refusals_and_bad_arguments_name_the_reason(load, level):
    assert SPECS[0].supports(AttentionProblem(5, 2, 16, 16)) == "5 query heads do not divide by 2 kv heads"
    assert SPECS[0].supports(AttentionProblem(4, 2, 16, 16, "float16")).startswith("q in float16")
    problem = AttentionProblem(2, 1, 16, 16, "float32", "float32")
    library = load(build(problem, level), level)
    qkv = torch.randn(1, 2, 16), torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    caches = tuple(torch.randn(2, 2, 8, 1, 16))
    slot, position = torch.tensor([0]), torch.tensor([8])
    with pytest.raises(KernelArgumentError, match="positions go past the cache"):
        cached_attention(library, problem, qkv, caches, slot, position, None, 1.0)
    with pytest.raises(KernelArgumentError, match="sinks are given, or missing"):
        cached_attention(library, problem, qkv, caches, slot, slot, torch.zeros(2), 1.0)
