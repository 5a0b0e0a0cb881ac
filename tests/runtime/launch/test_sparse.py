"""Sparse attention by library calls against the plain meaning of its ops: prefill, parts of prompts, decode."""

import math

import pytest
import torch

from moec.passes.ir import compressed_ops, sparse_ops
from moec.runtime.batch import Batch
from moec.runtime.launch.library import LIBRARY

pytestmark = pytest.mark.null
SLOTS, LENGTH = 5, 40
# (slot, first position, rows) of each step: prompts of many lengths, the rest of one of them, decode, all kinds at once
STEPS = [
    [(2, 0, 13), (0, 0, 1), (4, 0, 7)],
    [(0, 1, 9), (2, 13, 1)],
    [(4, 7, 1), (0, 10, 1), (2, 14, 1)],
    [(1, 0, 3), (4, 8, 17), (2, 15, 1)],
]
# float32 sums in another order
TOLERANCE = 1e-5


def places(step: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    slots = [s for s, _, n in step for _ in range(n)]
    return torch.tensor(slots), torch.tensor([p + i for _, p, n in step for i in range(n)])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def run(name: str, op, caches: list[tuple[int, ...]], make, *constants) -> list[torch.Tensor]:
    """The library's results for each step, which must equal the op's, and so must the caches. make(rows, seed): the
    tensors before the caches, and those behind the places."""
    ours, theirs = ([torch.zeros(shape) for shape in caches] for _ in range(2))
    function, results = LIBRARY[name](*constants), []
    for i, step in enumerate(STEPS):
        slots, positions = places(step)
        before, behind = make(len(slots), i)
        found = function(Batch.of(slots, positions), *before, *ours, slots, positions, *behind)
        expected = op(*before, *theirs, slots, positions, *behind, *constants)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
        results.append(found)
    return results


@pytest.mark.parametrize("size", [1, 3])
def test_index_topk(size: int) -> None:
    def make(rows: int, seed: int):
        return (randn(rows, 6, 8, seed=seed), randn(rows, 8, seed=seed), randn(rows, 6, seed=seed + 9)), ()

    first, *_ = run("index_topk", sparse_ops.index_topk, [(SLOTS, LENGTH, 8)], make, 0.5, 4, size)
    visible = torch.tensor([*range(1, 14), 1, *range(1, 8)]) // size
    assert torch.equal((first >= 0).sum(-1), visible.clamp(max=4))
    assert (first < visible[:, None]).all()
    assert all(len(set(row)) == len(row) for row in ([p for p in r if p >= 0] for r in first.tolist()))


def test_index_topk_by_hand() -> None:
    q, k = torch.tensor([[[1.0]], [[1.0]], [[1.0]]]), torch.tensor([[3.0], [-1.0], [5.0]])
    slots, positions, cache = torch.zeros(3, dtype=torch.long), torch.arange(3), torch.zeros(1, 3, 1)
    found = sparse_ops.index_topk(q, k, torch.ones(3, 1), cache, slots, positions, 1.0, 2)
    assert found.tolist() == [[0, -1], [0, 1], [2, 0]]


@pytest.mark.parametrize("num_local", [0, 2])
def test_index_blocks(num_local: int) -> None:
    def make(rows: int, seed: int):
        return (randn(rows, 2, 8, seed=seed), randn(rows, 8, seed=seed)), ()

    first, *_ = run("index_blocks", sparse_ops.index_blocks, [(SLOTS, LENGTH, 8)], make, 4, 3, num_local)
    if num_local:
        own = torch.tensor([*range(13), 0, *range(7)]) // 4
        assert (first == own[:, None, None]).any(-1).all()


@pytest.mark.parametrize(("groups", "size", "sinks"), [(1, 1, False), (2, 4, True)])
def test_sparse_attention(groups: int, size: int, sinks: bool) -> None:
    def make(rows: int, seed: int):
        _, positions = places(STEPS[seed])
        chosen = (torch.rand(rows, groups, 3, generator=torch.Generator().manual_seed(seed)) * 1.2 - 0.2).clamp(-1)
        chosen = (chosen * (positions[:, None, None] // size + 1)).floor().clamp(min=-1).int()
        chosen[..., 0] = (positions // size)[:, None]
        qkv = randn(rows, 4, 8, seed=seed), randn(rows, 2, 8, seed=seed), randn(rows, 2, 6, seed=seed)
        return (*qkv, chosen), (randn(4) if sinks else None,)

    caches = [(SLOTS, LENGTH, 2, 8), (SLOTS, LENGTH, 2, 6)]
    run("sparse_attention", sparse_ops.sparse_attention, caches, make, 0.35, size)


@pytest.mark.parametrize(("sparse", "window", "sinks"), [(True, 0, False), (True, 0, True), (False, 5, True)])
def test_sparse_latent_attention(sparse: bool, window: int, sinks: bool) -> None:
    def make(rows: int, seed: int):
        _, positions = places(STEPS[seed])
        chosen = torch.stack([positions, (positions - 3).clamp(min=-1), torch.full_like(positions, -1)], 1).int()
        new = randn(rows, 4, 12, seed=seed), randn(rows, 10, seed=seed), randn(rows, 4, seed=seed), randn(4 * 14, 10)
        return (*new, chosen if sparse else None), (randn(4) if sinks else None,)

    caches = [(SLOTS, LENGTH, 10), (SLOTS, LENGTH, 4)]
    run("sparse_latent_attention", sparse_ops.sparse_latent_attention, caches, make, 0.3, 8, window)


def test_everything_chosen_is_dense_attention() -> None:
    slots, positions = places(STEPS[0])
    q, k, v = randn(21, 4, 8), randn(21, 2, 8, seed=1), randn(21, 2, 6, seed=2)
    caches = [torch.zeros(SLOTS, LENGTH, 2, d) for d in (8, 6)]
    everything = torch.arange(13, dtype=torch.int32).expand(21, 1, 13)
    everything = everything.masked_fill(everything > positions[:, None, None], -1)
    found = sparse_ops.sparse_attention(q, k, v, everything, *caches, slots, positions, None, 0.35)
    expected = torch.ops.moec.cached_attention(q, k, v, *caches, slots, positions, None, 0.35)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("size", [1, 4, 9])
def test_pool_windows(size: int, overlap: bool) -> None:
    state = (SLOTS, size * (1 + overlap), 6)
    bias = randn(size, 6)

    def make(rows: int, seed: int):
        return (randn(rows, 6, seed=seed), randn(rows, 6, seed=seed + 5), bias), ()

    run("pool_windows", compressed_ops.pool_windows, [state, state], make, size)


def test_pool_windows_by_plain_mean() -> None:
    state = (SLOTS, 4, 6)

    def library(*args):
        x, x_state, slots, positions = args[-4:]
        batch = args[:-4]
        return LIBRARY["pool_windows"](4)(*batch, x, None, None, x_state, None, slots, positions)

    ours, theirs = torch.zeros(state), torch.zeros(state)
    for i, step in enumerate(STEPS):
        slots, positions = places(step)
        x = randn(len(slots), 6, seed=i)
        found = library(Batch.of(slots, positions), x, ours, slots, positions)
        expected = compressed_ops.pool_windows(x, None, None, theirs, None, slots, positions, 4)
        torch.testing.assert_close(found, expected)
    assert torch.equal(ours, theirs)


def test_pool_windows_by_hand() -> None:
    x, gate = torch.arange(10.0).view(5, 2), torch.zeros(5, 2)
    slots, positions, bias = torch.zeros(5, dtype=torch.long), torch.arange(5), torch.zeros(2, 2)
    states = [torch.zeros(1, 2, 2) for _ in range(2)]
    plain = compressed_ops.pool_windows(x, gate, bias, *states, slots, positions, 2)
    assert plain.tolist() == [[0, 0], [1, 2], [0, 0], [5, 6], [0, 0]]
    states = [torch.zeros(1, 4, 2) for _ in range(2)]
    overlapping = compressed_ops.pool_windows(x, gate, bias, *states, slots, positions, 2)
    # row 1: its own second features 1, 3 alone; row 3: first features 0, 2 of the window before, second ones 5, 7
    assert overlapping[:, 0].tolist() == [0, 2, 0, 3.5, 0]


@pytest.mark.parametrize(("window", "sparse"), [(5, False), (0, True), (3, True)])
def test_compressed_attention(window: int, sparse: bool) -> None:
    def make(rows: int, seed: int):
        _, positions = places(STEPS[seed])
        last = (positions + 1) // 4 - 1
        chosen = torch.stack([last, torch.full_like(last, -1)], 1).int() if sparse else None
        return (randn(rows, 4, 8, seed=seed), randn(rows, 8, seed=seed), randn(rows, 8, seed=seed + 3), chosen), (
            randn(4),
        )

    caches = [(SLOTS, LENGTH, 8), (SLOTS, LENGTH, 8)]
    run("compressed_attention", compressed_ops.compressed_attention, caches, make, 0.35, window, 4)


def test_no_rows() -> None:
    none = torch.zeros(0, dtype=torch.long)
    batch = Batch.of(none, none)
    cache = torch.zeros(2, 8, 8)
    found = LIBRARY["index_topk"](0.5, 4)(batch, randn(0, 6, 8), randn(0, 8), randn(0, 6), cache, none, none)
    assert found.shape == (0, 4)
    states = [torch.zeros(2, 8, 6) for _ in range(2)]
    pooled = LIBRARY["pool_windows"](4)(batch, randn(0, 6), randn(0, 6), randn(4, 6), *states, none, none)
    assert pooled.shape == (0, 3) and not math.isnan(float(pooled.sum()))
