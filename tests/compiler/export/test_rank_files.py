"""Weights files of several ranks: as if each were written alone, with sources that they share read once."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moec.compiler.errors import CheckpointError
from moec.compiler.export.rank_files import write_rank_weights
from moec.compiler.export.weights_file import write_weights
from moec.compiler.lowering.packing import DOWN, DTYPES, GATE_UP
from moec.passes.ir.formats import parse_format
from moec.passes.ir.quantised import quantised, stored
from moec.passes.ir.weights import Weight, pack, slice_, source, stack

pytestmark = pytest.mark.null
RANKS, EXPERTS, ROWS, COLUMNS = 2, 4, 128, 64
SOURCES = {
    f"{n}{e}": torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(8 * e + ord(n)))
    for n in "gd"
    for e in range(EXPERTS)
} | {"norm": torch.ones(COLUMNS)}


def stacked(letter: str) -> Weight:
    return stack([source(f"{letter}{e}", (ROWS, COLUMNS), torch.float32) for e in range(EXPERTS)])


def packed(weight: Weight, kind: str) -> Weight:
    e, n, k = weight.shape
    return pack(weight, f"{kind}:row32:plain", (), (e, n // 32, k * 32), DTYPES["row32"])


def columns(rank: int) -> dict[str, Weight]:
    """A rank's rows of one projection, in a kernel's layout, its columns of the other, in int4, and what all hold."""
    rows, half = ROWS // RANKS, COLUMNS // RANKS
    up = slice_(stacked("g"), 1, rank * rows, (rank + 1) * rows)
    down = quantised(slice_(stacked("d"), 2, rank * half, (rank + 1) * half), parse_format("int4-g32"), "down")
    norm = source("norm", (COLUMNS,), torch.float32)
    return {"up": packed(up, GATE_UP), "norm": norm, "down": stored(down)}


def experts(rank: int) -> dict[str, Weight]:
    """A rank's experts."""
    first = rank * EXPERTS // RANKS
    return {n: packed(slice_(stacked(n), 0, first, first + EXPERTS // RANKS), DOWN) for n in "gd"}


class Reader:
    """Notes how often what is read, and how many of the tensors that it gave are there at a time."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.most, self._alive = 0, weakref.WeakSet[Tensor]()

    def __call__(self, name: str) -> Tensor:
        tensor = SOURCES[name].clone()
        self.order.append(name)
        self._alive.add(tensor)
        self.most = max(self.most, len(self._alive))
        return tensor


@pytest.mark.parametrize("share", [columns, experts])
def test_files_are_those_of_ranks_written_alone(share, tmp_path: Path) -> None:
    paths, ranks = [tmp_path / str(r) for r in range(RANKS)], [share(r) for r in range(RANKS)]
    seen: list[tuple[int, int]] = []
    write_rank_weights(paths, ranks, SOURCES.__getitem__, lambda done, total: seen.append((done, total)))
    for path, weights in zip(paths, ranks, strict=True):
        write_weights(tmp_path / "alone", weights, SOURCES.__getitem__)
        assert path.read_bytes() == (tmp_path / "alone").read_bytes()
    total = sum(w.num_bytes for weights in ranks for w in weights.values())
    assert seen[-1] == (total, total) and all(a < b for (a, _), (b, _) in itertools.pairwise(seen))


def test_ranks_that_share_columns_read_each_tensor_once_and_an_expert_at_a_time(tmp_path: Path) -> None:
    read, ranks = Reader(), [columns(r) for r in range(RANKS)]
    del ranks[0]["down"], ranks[1]["down"]  # `stored` makes all experts of a rank at once
    write_rank_weights([tmp_path / str(r) for r in range(RANKS)], ranks, read)
    assert read.order == [f"g{e}" for e in range(EXPERTS)] + ["norm"]
    assert read.most == 1
    read = Reader()
    write_rank_weights([tmp_path / str(r) for r in range(RANKS)], [columns(r) for r in range(RANKS)], read)
    assert set(Counter(read.order).values()) == {1} and len(read.order) == len(SOURCES)


def test_ranks_of_other_experts_follow_one_another(tmp_path: Path) -> None:
    """Nothing is shared, so that one rank's weight is in memory."""
    read = Reader()
    write_rank_weights([tmp_path / str(r) for r in range(RANKS)], [experts(r) for r in range(RANKS)], read)
    assert read.order == [f"{n}{e}" for n in "gd" for e in range(EXPERTS)] and read.most == 1


def test_ranks_may_hold_more_or_fewer_weights(tmp_path: Path) -> None:
    ranks = [columns(0), {"norm": source("norm", (COLUMNS,), torch.float32)}, {}]
    paths = [tmp_path / str(r) for r in range(3)]
    write_rank_weights(paths, ranks, SOURCES.__getitem__)
    for path, weights in zip(paths, ranks, strict=True):
        write_weights(tmp_path / "alone", weights, SOURCES.__getitem__)
        assert path.read_bytes() == (tmp_path / "alone").read_bytes()


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    damaged = SOURCES | {"g2": torch.full((ROWS, COLUMNS), float("nan"))}
    with pytest.raises(CheckpointError, match="tensor g2 holds NaN or infinity"):
        write_rank_weights(
            [tmp_path / str(r) for r in range(RANKS)], [columns(r) for r in range(RANKS)], damaged.__getitem__
        )
