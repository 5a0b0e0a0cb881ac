"""The library kernels against the plain meaning of the moec ops (moec.passes.ir.ops)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moec.passes.ir import ops
from moec.passes.ir.gate import GateSpec
from moec.runtime.batch import Batch
from moec.runtime.errors import FormatError
from moec.runtime.launch.activation import activation
from moec.runtime.launch.gate import router
from moec.runtime.launch.library import LIBRARY

# float32: sums of at most 64 products in another order; bfloat16: one or two steps of 2**-8 where a rounding tips
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
DTYPES = [torch.float32, torch.bfloat16]
SPECS = [
    GateSpec(2),
    GateSpec(2, renormalise=True),
    GateSpec(3, order="topk_then_score", weights_dtype="bfloat16"),
    GateSpec(2, "sigmoid", renormalise=True, renorm_eps=1e-20, bias_on="scores", scale=2.5),
    GateSpec(2, "sigmoid", bias_on="scores", num_groups=4, groups_kept=2, group_score="sum_top2"),
    GateSpec(2, num_groups=4, groups_kept=1, scale=16.0),
    GateSpec(2, renormalise=True, renorm_rule="clamp", renorm_eps=1e-12, bias_on="logits"),
    GateSpec(1, "sigmoid", "topk_then_score"),
    GateSpec(2, "sparsemixer", jitter_eps=0.01),
    GateSpec(2, transform="std", transform_param=1e-6),
    GateSpec(2, transform="tanh_cap", transform_param=30.0),
    GateSpec(2, transform="temperature", transform_param=0.7, compute_dtype="bfloat16"),
]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype and found.is_contiguous()
    torch.testing.assert_close(found, expected, **TOLERANCE.get(found.dtype, {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.encode()[:60])
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_gate(spec: GateSpec, tokens: int) -> None:
    bias = randn(8) * 0.1 if spec.bias_on != "none" else None
    logits = randn(tokens, 8)
    if tokens > 4:
        logits[1] = 0.5  # all equal: the lowest indices win
        logits[2, 3] = logits[2, 5]
        logits[3] = logits[3].round()
    weights, experts = router(spec.encode())(logits, bias)
    expected_weights, expected_experts = ops.gate(logits, bias, spec.encode())
    assert torch.equal(experts, expected_experts)
    close(weights, expected_weights)


def test_nan_logits_give_nan_weights() -> None:
    logits = randn(2, 8)
    logits[0, 3] = float("nan")
    weights, _ = router(GateSpec(2, renormalise=True).encode())(logits, None)
    assert weights[0].isnan().all() and not weights[1].isnan().any()


def test_unknown_gate_fields_and_activations_are_refused() -> None:
    for text in ('{"top_k":2,"new_field":1}', "{}"):
        with pytest.raises(FormatError, match="gate spec"):
            router(text)
    with pytest.raises(FormatError, match="activation 'swish'"):
        activation("swish")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_linear(dtype: torch.dtype) -> None:
    spec = GateSpec(2).encode()
    x, w, b = randn(9, 16, dtype=dtype), randn(8, 16, dtype=dtype), randn(8, dtype=dtype)
    for bias, router_dtype in ((None, "float32"), (b, str(dtype).removeprefix("torch."))):
        found = LIBRARY["gate_linear"](spec, router_dtype)(x, w, bias, None)
        for a, e in zip(found, ops.gate_linear(x, w, bias, None, spec, router_dtype), strict=True):
            close(a, e)


ACTS = ["silu", "gelu_tanh", "f32:silu", "silu@0.5", "swigluoai@0.7@1.702", "f32:softcapglu@0.7@0.9", "!relu2"]


def stacks(act: str, experts: int, hidden: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rows = inner if act.startswith("!") else 2 * inner
    w = (randn(experts, rows, hidden, dtype=dtype) / 4, randn(experts, hidden, inner, dtype=dtype) / 4)
    return (*w, randn(experts, rows, dtype=dtype) / 4, randn(experts, hidden, dtype=dtype) / 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("tokens", [0, 1, 23])
def test_experts(act: str, tokens: int, dtype: torch.dtype) -> None:
    w_in, w_out, b_in, b_out = stacks(act, 6, 16, 12, dtype)
    x, weights = randn(tokens, 16, dtype=dtype), randn(tokens, 2).abs()
    index = torch.stack([torch.arange(tokens) % 5, (torch.arange(tokens) * 3 + 1) % 7], 1).int()  # 6 is nobody's
    for biases in ((None, None), (b_in, b_out)):
        for on_input in (False, True):
            args: tuple[Any, ...] = (x, weights, index, w_in, w_out, *biases, None)
            found = LIBRARY["experts"](act, weight_on_input=on_input)(*args)
            close(found, ops.experts(*args, act, 0, on_input))


@pytest.mark.parametrize("shared", [False, True])
def test_shared_experts(shared: bool) -> None:
    w_in, w_out, *_ = stacks("silu", 6, 16, 12, torch.float32)
    x, weights, index = randn(7, 16), randn(7, 2), torch.randint(0, 4, (7, 2), dtype=torch.int32)
    factor = randn(7) if shared else None
    args = (x, weights, index, w_in, w_out, None, None, factor)
    close(LIBRARY["experts"]("silu", num_shared=2)(*args), ops.experts(*args, "silu", 2))


def test_experts_as_checkpoints_store_them() -> None:
    w_in, w_out, b_in, b_out = stacks("swigluoai@7.0@1.702", 4, 16, 12, torch.float32)
    args = (randn(7, 16), randn(7, 2), torch.randint(0, 4, (7, 2), dtype=torch.int32))
    tail = (w_in.transpose(1, 2).contiguous(), w_out.transpose(1, 2).contiguous(), b_in, b_out, None)
    found = LIBRARY["experts"]("swigluoai@7.0@1.702", transposed=True, interleaved=True)(*args, *tail)
    close(found, ops.experts(*args, *tail, "swigluoai@7.0@1.702", 0, False, True, True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 23])
def test_grouped_chain(tokens: int, dtype: torch.dtype) -> None:
    w_in, w_out, b_in, b_out = stacks("silu", 7, 16, 12, dtype)
    x, index = randn(tokens, 16, dtype=dtype), torch.randint(0, 6, (tokens, 2), dtype=torch.int32)
    slot_weight = randn(tokens * 3).abs()
    order, start = LIBRARY["dispatch"](6, num_shared=1)(index)
    expected_order, expected_start = ops.dispatch(index, 6, 1)
    assert torch.equal(order, expected_order) and torch.equal(start, expected_start)
    for factor in (None, slot_weight):
        h = LIBRARY["grouped_gemm"](3, "silu")(x, w_in, b_in, order, start, factor)
        close(h, ops.grouped_gemm(x, w_in, b_in, order, start, factor, 3, "silu"))
        y = LIBRARY["combine_gemm"](3)(h, w_out, b_out, order, start, factor)
        close(y, ops.combine_gemm(h, w_out, b_out, order, start, factor, 3))


@pytest.mark.parametrize("shared", [0, 1])
def test_grouped_chain_of_experts_that_are_not_held(shared: int) -> None:
    w_in, w_out, *_ = stacks("silu", 6 + shared, 16, 12, torch.float32)
    x, index = randn(23, 16), torch.randint(0, 9, (23, 2), dtype=torch.int32)
    weights = randn(23, 2)
    slot_weight = torch.cat([weights, torch.ones(23, shared)], 1).flatten()
    order, start = LIBRARY["dispatch"](6, num_shared=shared)(index)
    h = LIBRARY["grouped_gemm"](2 + shared, "silu")(x, w_in, None, order, start, None)
    y = LIBRARY["combine_gemm"](2 + shared)(h, w_out, None, order, start, slot_weight)
    expected = ops.experts(x, weights, index, w_in, w_out, None, None, None, "silu", shared)
    close(y, expected)
    order, start = ops.dispatch(index, 6, shared)
    h = ops.grouped_gemm(x, w_in, None, order, start, None, 2 + shared, "silu")
    close(ops.combine_gemm(h, w_out, None, order, start, slot_weight, 2 + shared), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "constants",
    [(1e-6,), (1e-5, "after_weight"), (1e-6, "after_weight", 1.0), (1e-6, "before_weight", 0.0, True)],
)
def test_norms(dtype: torch.dtype, constants: tuple) -> None:
    x, residual = randn(5, 3, 32, dtype=dtype), randn(5, 3, 32, dtype=dtype, seed=9)
    for weight in (None, randn(32, dtype=dtype), randn(3, 32, dtype=dtype), randn(32)):
        close(LIBRARY["rms_norm"](*constants)(x, weight), ops.rms_norm(x, weight, *constants))
        found = LIBRARY["add_rms_norm"](*constants)(x, residual, weight)
        for a, e in zip(found, ops.add_rms_norm(x, residual, weight, *constants), strict=True):
            close(a, e)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", ["half", "interleaved", "deinterleaved"])
@pytest.mark.parametrize(("rotary", "compute"), [(8, "input"), (4, "float32")])
def test_rope(dtype: torch.dtype, pairing: str, rotary: int, compute: str) -> None:
    x, cos, sin = randn(5, 3, 8, dtype=dtype), randn(5, rotary // 2), randn(5, rotary // 2, seed=3)
    close(LIBRARY["rope"](pairing, rotary, compute)(x, cos, sin), ops.rope(x, cos, sin, pairing, rotary, compute))


def test_gated_mlp() -> None:
    w_in, w_out, b_in, b_out = (w[0] for w in stacks("silu", 1, 16, 12, torch.float32))
    args = (randn(5, 16), w_in, w_out, b_in, b_out)
    close(LIBRARY["gated_mlp"]("silu")(*args), ops.gated_mlp(*args, "silu"))


def ragged(lengths: list[int], starts: list[int], slots: list[int]) -> tuple[Tensor, Tensor, Batch]:
    rows = [(s, p) for s, n, at in zip(slots, lengths, starts, strict=True) for p in range(at, at + n)]
    both = torch.tensor(rows)
    return both[:, 0].contiguous(), both[:, 1].contiguous(), Batch.of_lengths(slots, lengths, starts)


BATCHES = {
    "prefill": ([5, 12, 1], [0, 0, 0], [0, 1, 2]),
    "decode": ([1, 1, 1], [4, 9, 0], [0, 1, 2]),
    "decode of scattered slots": ([1, 1], [9, 3], [2, 0]),
    "mixed": ([3, 1, 4], [5, 11, 0], [2, 0, 1]),
}
MASKS = [{}, {"window": 4}, {"chunk": 4}, {"softcap": 5.0}, {"window": 3, "softcap": 5.0}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("heads", "value_dim"), [(4, 8), (2, 8), (4, 6)])
def test_cached_attention(batch: str, mask: dict, dtype: torch.dtype, heads: int, value_dim: int) -> None:
    slots, positions, plan = ragged(*BATCHES[batch])
    t = slots.shape[0]
    q, k, v = (randn(t, h, d, dtype=dtype, seed=i) for i, (h, d) in enumerate(((heads, 8), (2, 8), (2, value_dim))))
    caches = [randn(3, 16, 2, 8, dtype=dtype), randn(3, 16, 2, value_dim, dtype=dtype)]
    for sinks in (None, randn(heads, dtype=dtype)):
        mine, theirs = [c.clone() for c in caches], [c.clone() for c in caches]
        strided = q.transpose(0, 1).contiguous().transpose(0, 1)  # as it comes out of a norm over heads
        found = LIBRARY["cached_attention"](0.35, **mask)(plan, strided, k, v, *mine, slots, positions, sinks)
        close(found, ops.cached_attention(q, k, v, *theirs, slots, positions, sinks, 0.35, **mask))
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_latent_attention(batch: str, dtype: torch.dtype) -> None:
    slots, positions, plan = ragged(*BATCHES[batch])
    t = slots.shape[0]
    q, latent, k_rope = randn(t, 4, 12, dtype=dtype), randn(t, 10, dtype=dtype), randn(t, 4, dtype=dtype)
    w = randn(4 * (8 + 6), 10, dtype=dtype) / 4
    mine, theirs = ([randn(3, 16, 10, dtype=dtype), randn(3, 16, 4, dtype=dtype)] for _ in range(2))
    found = LIBRARY["latent_attention"](0.3, 8)(plan, q, latent, k_rope, w, *mine, slots, positions)
    close(found, ops.latent_attention(q, latent, k_rope, w, *theirs, slots, positions, 0.3, 8))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_batch_reads_its_runs_from_tensors() -> None:
    for lengths, starts, slots in BATCHES.values():
        slot_ids, positions, plan = ragged(lengths, starts, slots)
        assert Batch.of(slot_ids, positions).runs == plan.runs
    with pytest.raises(ValueError, match="not consecutive"):
        Batch.of(torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]))
