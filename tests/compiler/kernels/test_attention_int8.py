"""Attention over int8 caches: the kernel and the library against the op, and the op against attention without codes."""

import pytest
import torch

from moec.compiler.kernels.attention.cached_attention import AttentionProblem, build, cached_attention
from moec.passes.ir import cache_ops, ops
from moec.runtime.batch import Batch
from moec.runtime.launch import library as runtime_library

pytestmark = pytest.mark.cpu

NUM_SLOTS, LENGTH = 4, 100
SHAPES = [(8, 2, 64, 64, "bfloat16"), (5, 5, 20, 12, "float32"), (6, 1, 80, 48, "bfloat16")]
# float32: sums of 100 products of numbers up to 4; bfloat16: the result's rounding, 2**-9 of values up to 4
TOLERANCE = {"float32": 4e-6, "bfloat16": 2**-6}
BATCHES = {
    "decode": ([2, 0, 3], [70, 0, 33]),
    "prefill": ([1] * 40 + [3] * 45, [*range(40), *range(10, 55)]),
    "mixed": ([1, 1, 1, 0, 2, 2, 3], [97, 98, 99, 5, 63, 64, 0]),
    "empty": ([], []),
}


def inputs(heads, kv_heads, d, dv, dtype, mode):
    """q, k, v, four caches, slots and positions."""
    slots, positions = (torch.tensor(x, dtype=torch.long) for x in BATCHES[mode])
    kind = getattr(torch, dtype)
    qkv = [torch.randn(len(slots), n, w).to(kind) for n, w in ((heads, d), (kv_heads, d), (kv_heads, dv))]
    old = [cache_ops.to_codes(torch.randn(NUM_SLOTS, LENGTH, kv_heads, w)) for w in (d, dv)]
    return qkv, [old[0][0], old[1][0], old[0][1], old[1][1]], slots, positions


def wanted(qkv, caches, slots, positions, sinks, scale, window, chunk, softcap):
    """The op in float64 on the same codes -> the result and the caches after it."""
    q, k, v = qkv
    caches = [c.clone() for c in caches]
    for new, cache, scales in ((k, caches[0], caches[2]), (v, caches[1], caches[3])):
        cache[slots, positions], scales[slots, positions] = cache_ops.to_codes(new)
    keys, values = (c.double() * s.double().unsqueeze(-1) for c, s in zip(caches[:2], caches[2:], strict=True))
    new = keys[slots, positions], values[slots, positions]
    y = ops.cached_attention(q.double(), *new, keys, values, slots, positions, sinks, scale, window, chunk, softcap)
    return y, caches


def check(got, after, expected, caches, dtype):
    for a, b in zip(after, caches, strict=True):
        assert torch.equal(a, b)
    assert got.dtype == getattr(torch, dtype) and got.shape == expected.shape
    assert got.numel() == 0 or float((got.double() - expected).abs().max()) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("heads", "kv_heads", "d", "dv", "dtype"), SHAPES)
def test_kernel_library_and_op_agree_with_float64_on_the_codes(load, level, heads, kv_heads, d, dv, dtype):
    problem = AttentionProblem(heads, kv_heads, d, dv, dtype, "int8", sinks_dtype="float32")
    kernel = load(build(problem, level), level)
    for mode in BATCHES:
        for window, chunk in ((0, 0), (7, 0), (0, 16)):
            qkv, caches, slots, positions = inputs(heads, kv_heads, d, dv, dtype, mode)
            rest = (slots, positions, torch.randn(heads), d**-0.5, window, chunk)
            expected, after = wanted(qkv, caches, *rest, 0.0)
            mine = [c.clone() for c in caches]
            check(cached_attention(kernel, problem, tuple(qkv), tuple(mine), *rest), mine, expected, after, dtype)
            mine = [c.clone() for c in caches]
            check(cache_ops.cached_attention_int8(*qkv, *mine, *rest), mine, expected, after, dtype)
            mine = [c.clone() for c in caches]
            call = runtime_library.LIBRARY["cached_attention_int8"](d**-0.5, window, chunk)
            got = call(Batch.of(slots, positions), *qkv, *mine, slots, positions, rest[2])
            check(got, mine, expected, after, dtype)


def test_codes_are_within_half_a_step():
    x = torch.randn(50, 3, 64) * torch.logspace(-6, 6, 50)[:, None, None]
    codes, scales = cache_ops.to_codes(x)
    assert codes.abs().amax(-1).eq(127).all()
    assert ((codes * scales.unsqueeze(-1) - x).abs() <= scales.unsqueeze(-1) * 0.50001).all()  # division rounds too


def test_zeros_and_nan_rows(load, level):
    """A row of zeros stays zero; NaN and infinity come back as NaN in the queries that see them, in all three."""
    problem = AttentionProblem(1, 1, 20, 20, "float32", "int8")
    kernel = load(build(problem, level), level)
    for bad, broken in ((0.0, False), (float("nan"), True), (float("inf"), True)):
        qkv, caches, slots, positions = inputs(1, 1, 20, 20, "float32", "decode")
        qkv[1][0, 0, 5], qkv[2][:] = bad, 0.0
        expected, after = wanted(qkv, caches, slots, positions, None, 0.2, 0, 0, 0.0)
        mine = [c.clone() for c in caches]
        got = cached_attention(kernel, problem, tuple(qkv), tuple(mine), slots, positions, None, 0.2)
        assert got[0].isnan().any() == broken and expected[0].isnan().any() == broken
        assert not got[1:].isnan().any()
        assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(mine, after, strict=True))
