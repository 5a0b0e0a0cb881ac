"""Attention over the cache in emulation: groups, windows, chunks, caps, sinks, splits without keys, ragged batches."""

import math

import pytest
import torch
from cuda_layer import some_slow

from moec.compiler.codegen.cuda_archs import architecture
from moec.compiler.kernels.attention.problem import AttentionProblem
from moec.compiler.kernels.cuda import attention

pytestmark = pytest.mark.null

# one rounding of the weights to bf16 before they meet the values (2**-9 of each), and one of the result
TOLERANCE = 2**-8


def reference(q, caches, slots, positions, sinks, scale, window, chunk, softcap):
    """f64 [T,Q,Dv] of a batch whose keys are in the caches [N,L,C,D], [N,L,C,Dv]; nothing is rounded."""
    out = []
    for row, s, p in zip(q.double(), slots.tolist(), positions.tolist(), strict=True):
        j = torch.arange(p + 1)
        seen = (j > p - window if window else j >= 0) & (j // chunk == p // chunk if chunk else j >= 0)
        k, v = (c[s, : p + 1][seen].double().repeat_interleave(len(row) // c.shape[2], 1) for c in caches)
        a = torch.einsum("qd,kqd->qk", row, k) * scale
        a = torch.tanh(a / softcap) * softcap if softcap else a
        if sinks is not None:
            a = torch.cat([a, sinks.double()[:, None]], 1)
        out.append(torch.einsum("qk,kqd->qd", a.softmax(1)[:, : len(k)], v))
    return torch.stack(out)


class Kernels:
    """append, decode and merge of a problem on a cache of 3 sequences of 200 places; NaN where nothing was written."""

    def __init__(self, emulated, run, problem, arch="sm_80"):
        assert attention.refusal(problem, architecture(arch)) is None
        self.problem, self.run = problem, run
        self.append, self.decode, self.merge = (
            emulated(name, getattr(attention, f"build_{name}")(problem), arch) for name in ("append", "decode", "merge")
        )
        self.caches = [
            torch.full((3, 200, problem.num_kv_heads, d), math.nan).bfloat16()
            for d in (problem.head_dim, problem.value_dim)
        ]

    def fill(self, lengths):
        """Keys and values of the places before those that a test asks for."""
        for cache in self.caches:
            for s, length in enumerate(lengths):
                cache[s, :length] = torch.randn(length, *cache.shape[2:]).bfloat16()

    def __call__(self, slots, positions, splits, sinks=None, scale=0.1, window=0, chunk=0, softcap=0.0):
        """-> what the kernels give, and the reference; q, k and v are rows of wider tensors."""
        p, n = self.problem, len(slots)
        slots, positions = torch.tensor(slots), torch.tensor(positions)
        widths = {"q": p.num_heads * p.head_dim, "k": p.num_kv_heads * p.head_dim, "v": p.num_kv_heads * p.value_dim}
        values = {"n": n, "parts": splits * n, "cached": 600, "cache_length": 200, "splits": splits}
        values |= {"slots": slots, "positions": positions, "k_cache": self.caches[0], "v_cache": self.caches[1]}
        for name, width in widths.items():
            x = torch.randn(n, width + 8).bfloat16()
            values |= {name: x, f"{name}_stride": width + 8, f"{name}_elements": x.numel()}
        self.run(self.append, values)
        part = torch.full((splits * n, p.num_heads, p.value_dim), math.nan)
        values |= {"part": part, "stats": torch.full((splits * n, p.num_heads, 2), math.nan)}
        values |= {"scale": scale, "window": window, "chunk": chunk, "softcap": softcap}
        self.run(self.decode, values)
        out = torch.full((n, p.num_heads, p.value_dim), math.nan).bfloat16()
        self.run(self.merge, values | {"out": out, "sinks": sinks})
        q = values["q"][:, : widths["q"]].view(n, p.num_heads, p.head_dim)
        return out, reference(q, self.caches, slots, positions, sinks, scale, window, chunk, softcap)


def close(got, want):
    return not got.isnan().any() and (got.double() - want).abs().max() < TOLERANCE * want.abs().max()


def test_groups_and_splits(emulated, run):
    """One token of each sequence: the first place of all, a range that ends inside a step, several steps."""
    torch.manual_seed(0)
    kernels = Kernels(emulated, run, AttentionProblem(6, 2, 64, 64))
    kernels.fill((0, 70, 199))
    for splits in (1, 3):
        assert close(*kernels([0, 1, 2], [0, 70, 199], splits))


def test_windows_chunks_and_a_prompt(emulated, run):
    """Three tokens of one sequence and one of another: what is appended is seen by the tokens behind it."""
    torch.manual_seed(0)
    kernels = Kernels(emulated, run, AttentionProblem(6, 2, 64, 64))
    kernels.fill((130, 5, 0))
    assert close(*kernels([0, 0, 0, 1], [130, 131, 132, 5], 2, window=9))
    assert close(*kernels([1, 1, 0], [6, 7, 133], 2, chunk=64))
    assert close(*kernels([2, 0], [0, 134], 4, window=100, chunk=32))


WIDE = AttentionProblem(16, 1, 96, 32, sinks_dtype="float32", softcap=True)


def test_sinks_caps_and_odd_widths(emulated, run):
    """16 query heads on one kv head, keys of one panel and a half, values of half a panel; a sink above all scores."""
    torch.manual_seed(0)
    kernels = Kernels(emulated, run, WIDE)
    kernels.fill((90, 0, 33))
    sinks = torch.randn(16) * 3
    sinks[3] = 30.0
    assert close(*kernels([0, 1, 2], [90, 0, 33], 2, sinks=sinks, softcap=2.5))


FAULTS = {
    "values that are not turned": (r"x4\.trans\.shared\.b16", "x4.shared.b16"),
    "a key past the last": (r"(bounds_ptr\[1\] = min\(.*, \(v_\d+ \+ )1\)\);", r"\g<1>2));"),
    "a wait for one group too few": (r"cp\.async\.wait_group 1", "cp.async.wait_group 2"),
    "warps that do not wait for each other's sums": (r"  tvm_builtin_cuda_cta_sync\(\);\n(  for \(int)", r"\1"),
}


@pytest.mark.parametrize("fault", some_slow(FAULTS, (1, 3)))
def test_a_planted_fault_is_found(emulated, planted, run, fault):
    torch.manual_seed(0)
    kernels = Kernels(emulated, run, AttentionProblem(6, 2, 64, 64))
    kernels.fill((0, 60, 199))
    kernels.decode, right = planted(kernels.decode, *FAULTS[fault]), kernels.decode
    kernels.run = lambda kernel, values: kernel.run(values, kernel.source.grid_of(values), True, 2)
    assert not close(*kernels([1, 2], [60, 199], 2))
    kernels.decode = right
    assert close(*kernels([1, 2], [60, 199], 2))


def test_nan_keys_are_not_hidden(emulated, run):
    torch.manual_seed(0)
    kernels = Kernels(emulated, run, AttentionProblem(6, 2, 64, 64))
    kernels.fill((40, 40, 0))
    kernels.caches[0][0, 17, 1, 5] = math.nan
    out, _ = kernels([0, 1], [40, 40], 2)
    assert out[0, 3:].isnan().all() and not out[0, :3].isnan().any() and not out[1].isnan().any()


def test_refusals_name_the_reason():
    sm_89 = architecture("sm_89")
    for problem, reason in (
        (AttentionProblem(32, 1, 64, 64), "32 query heads for one kv head, at most 16"),
        (AttentionProblem(8, 8, 72, 64), "heads of 72 and 64 columns, not multiples of 16 up to 256"),
        (AttentionProblem(8, 8, 64, 64, cache_dtype="int8"), "q in bfloat16, caches in int8, sinks in None; only"),
        (AttentionProblem(8, 8, 256, 272), "heads of 256 and 272 columns"),
    ):
        assert str(attention.refusal(problem, sm_89)).startswith(reason)
