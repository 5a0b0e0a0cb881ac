"""Comparing two versions: NaN and infinities must agree, routings are maps, ties are left open, zero weights too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, tensor

from moec.passes.infra.compare import OpenRows, compare, relative_error, tied_rows

aten = torch.ops.aten
NAN, INF = float("nan"), float("inf")


@pytest.mark.null
@pytest.mark.parametrize(
    ("a", "b", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 4.0], [1.0, 3.0], 0.25),
        ([NAN, 2.0], [NAN, 2.0], 0.0),
        ([NAN, 2.0], [0.0, 2.0], INF),
        ([INF, 2.0], [INF, 2.0], 0.0),
        ([INF, 2.0], [-INF, 2.0], INF),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([], [], 0.0),
    ],
)
def test_relative_error(a: list[float], b: list[float], error: float) -> None:
    assert relative_error(tensor(a), tensor(b)) == pytest.approx(error)


def _routings(weights: Tensor, experts: list[list[int]]) -> dict[str, Tensor]:
    return {"w": weights, "e": tensor(experts)}


@pytest.mark.null
def test_routings_are_maps() -> None:
    first = _routings(tensor([[0.7, 0.3]]), [[4, 1]])
    turned = _routings(tensor([[0.3, 0.7]]), [[1, 4]])
    wrong = _routings(tensor([[0.7, 0.3]]), [[1, 4]])
    other = _routings(tensor([[0.7, 0.3]]), [[4, 2]])
    nothing = OpenRows(torch.zeros(1, dtype=torch.bool))
    assert compare(first, turned, [("w", "e")], nothing).error == 0
    assert compare(first, wrong, [("w", "e")], nothing).error > 0.5
    assert compare(first, other, [("w", "e")], nothing).error == math.inf
    assert compare(first, other, [("w", "e")], nothing).what == "routing (w, e)"
    tied = compare(first, other, [("w", "e")], OpenRows(torch.ones(1, dtype=torch.bool)))
    assert tied.error == 0 and tied.note == "1 tied rows compared by weight only"
    heavier = _routings(tensor([[0.8, 0.2]]), [[4, 2]])
    assert compare(first, heavier, [("w", "e")], OpenRows(torch.ones(1, dtype=torch.bool))).error > 0.1
    groups = compare(first, heavier, [("w", "e")], OpenRows(torch.ones(1, dtype=torch.bool), by_weight=False))
    assert groups.error == 0 and groups.note == "1 tied rows left out"


@pytest.mark.null
def test_an_expert_of_weight_zero_does_not_matter() -> None:
    first, second = _routings(tensor([[1.0, 0.0]]), [[3, 5]]), _routings(tensor([[1.0, 0.0]]), [[3, 0]])
    assert compare(first, second, [("w", "e")], OpenRows(torch.zeros(1, dtype=torch.bool))).error == 0


@pytest.mark.null
@pytest.mark.parametrize(
    ("op", "scores", "args", "rows"),
    [
        (aten.topk.default, [[3.0, 2.0, 2.0], [3.0, 2.0, 1.0]], (2,), [True, False]),
        (aten.topk.default, [[3.0, 3.0, 1.0], [3.0, 2.0, 1.0]], (2,), [False, False]),
        (aten.topk.default, [[3.0, 2.0], [2.0, 2.0], [2.0, 1.0]], (1, 0), None),
        (aten.argmax.default, [[2.0, 2.0], [1.0, 2.0]], (-1,), [True, False]),
        (aten.max.dim, [[2.0, 2.0], [1.0, 2.0]], (-1, True), [True, False]),
        (aten.sort.default, [[2.0, 1.0, 1.0], [3.0, 2.0, 1.0]], (-1, True), [True, False]),
        (aten.topk.default, [[1.0, 1.0 + 1e-7, 0.0], [1.0, 1.1, 0.0]], (1,), [True, False]),
    ],
)
def test_tied_rows(op, scores: list[list[float]], args: tuple, rows: list[bool] | None) -> None:
    given = tensor(scores)
    if rows is None:  # along the other axis: the columns are the tokens
        assert tied_rows([(op, given, args)], 2).tolist() == [False, True]
    else:
        assert tied_rows([(op, given, args)], 2).tolist() == rows
