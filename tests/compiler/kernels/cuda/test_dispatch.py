"""The CUDA dispatch in emulation: equal to moec::dispatch bit for bit, and a tile map that covers every row once."""

import pytest
import torch

from moec.compiler.kernels.cuda import dispatch
from moec.compiler.kernels.cuda.dispatch import CHUNK, DispatchProblem
from moec.passes.ir import ops

pytestmark = pytest.mark.null


def routing(kind, num_tokens, problem):
    experts = torch.rand(num_tokens, problem.num_experts).argsort(-1)[:, : problem.top_k].to(torch.int32)
    if kind == "one":  # all tokens to the last experts
        experts[:] = torch.arange(problem.num_experts - problem.top_k, problem.num_experts, dtype=torch.int32)
    if kind == "elsewhere":
        experts[experts % 3 == 0] = problem.num_experts + 5
    return experts


def values(problem, experts):
    n = len(experts)
    new = lambda *shape: torch.full(shape, -7, dtype=torch.int32)  # noqa: E731
    tiles, chunks = problem.tiles(n), problem.chunks(n)
    outputs = {"slot_order": new(n * problem.slots_per_token), "expert_start": new(problem.bins)}
    outputs |= {"tile_expert": new(tiles), "tile_row": new(tiles), "counts": new(chunks, problem.bins)}
    return outputs | {"experts": experts, "n": n, "tiles": tiles, "chunks": chunks}


def check(problem, experts, got):
    held = torch.where(experts < problem.num_experts, experts, problem.stacked)
    shared = torch.arange(problem.num_experts, problem.stacked, dtype=torch.int32).expand(len(experts), -1)
    bins = torch.cat([held, shared], 1).reshape(-1)
    assert torch.equal(got["slot_order"], torch.sort(bins, stable=True).indices.int())
    counts = torch.bincount(bins, minlength=problem.bins)
    assert got["expert_start"].tolist() == [0, *counts.cumsum(0)[:-1].tolist()]
    want = [
        (e, start + j * problem.tile_rows)
        for e, start in enumerate(got["expert_start"].tolist()[:-1])
        for j in range(-(-int(counts[e]) // problem.tile_rows))
    ]
    tiles = list(zip(got["tile_expert"].tolist(), got["tile_row"].tolist(), strict=True))
    assert tiles == want + [(-1, -1)] * (len(tiles) - len(want))


@pytest.mark.parametrize("problem", [DispatchProblem(8, 2), DispatchProblem(64, 6, 2, 32), DispatchProblem(300, 8, 1)])
def test_one_launch(emulated, run, problem):
    torch.manual_seed(0)
    place = emulated("place", dispatch.build_place(problem, one_chunk=True))
    for kind, num_tokens in (("even", 1), ("even", CHUNK // problem.slots_per_token), ("one", 50), ("elsewhere", 9)):
        experts = routing(kind, num_tokens, problem)
        check(problem, experts, run(place, values(problem, experts)))


def test_it_is_the_op(emulated, run):
    problem = DispatchProblem(8, 2, num_shared=1)
    experts = routing("even", 40, problem)
    got = run(emulated("place", dispatch.build_place(problem, one_chunk=True)), values(problem, experts))
    order, start = ops.dispatch(experts, 8, 1)
    assert torch.equal(got["slot_order"], order) and torch.equal(got["expert_start"], start)


@pytest.mark.parametrize("kind", ["even", "one", "elsewhere"])
def test_many_chunks(emulated, run, kind):
    torch.manual_seed(0)
    problem = DispatchProblem(16, 2, num_shared=1, tile_rows=128)
    count, place = (emulated(n, f) for n, f in (
        ("count", dispatch.build_count(problem)), ("place", dispatch.build_place(problem, one_chunk=False))
    ))  # fmt: skip
    experts = routing(kind, 2 * CHUNK // 3 + 77, problem)
    got = run(count, values(problem, experts))
    check(problem, experts, run(place, got))


def test_tiles_bound_every_routing():
    problem = DispatchProblem(8, 2, tile_rows=16)
    assert [problem.tiles(n) for n in (1, 8, 100)] == [2, 9, 20]
    assert dispatch.refusal(DispatchProblem(4000, 2)) == "4000 experts, at most 2047"
