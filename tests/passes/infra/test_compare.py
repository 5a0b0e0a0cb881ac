"""Comparing two versions: NaN and infinities must agree, routings are maps, ties are left open, zero weights too."""

from __future__ import annotations

import math
import operator

import pytest
import torch
from torch import Tensor, tensor

from moec.passes.infra.compare import OpenRows, compare, looked_at, open_rows, relative_error, tied_rows

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
    tied_row = torch.ones(1, dtype=torch.bool)
    groups = compare(first, heavier, [("w", "e")], OpenRows(tied_row, free=tied_row))
    assert groups.error == 0 and groups.note == "1 tied rows left out"


def test_a_tie_of_biased_scores_leaves_the_weights_open_and_not_the_scores() -> None:
    """scores + bias choose, scores weigh (LFM2-MoE): equal sums in bfloat16 hide scores that are not equal."""
    graph = torch.fx.Graph()
    scores, biased = graph.placeholder("scores"), graph.placeholder("biased")
    chosen = graph.call_function(aten.topk.default, (biased, 2))
    experts = graph.call_function(operator.getitem, (chosen, 1))
    graph.call_function(aten.gather.default, (scores, 1, experts))
    sums = tensor([[0.9, 0.5, 0.5, 0.1], [0.9, 0.6, 0.5, 0.1], [0.9, 0.5, 0.5, 0.1]]).bfloat16()
    values = {"scores": tensor([[0.5, 0.4, 0.3, 0.1]] * 2 + [[0.5, 0.4, 0.4, 0.1]]), "biased": sums}
    assert looked_at(graph.nodes) == {"scores", "biased"}
    found = open_rows(graph.nodes, values, 3)
    assert found.rows.tolist() == [True, False, True] and found.weighed.tolist() == [False, True, True]

    first = _routings(tensor([[0.5, 0.4]] * 3), [[0, 1]] * 3)
    other_tied = _routings(tensor([[0.5, 0.3], [0.5, 0.4], [0.5, 0.4]]), [[0, 2], [0, 1], [2, 0]])
    compared = compare(first, other_tied, [("w", "e")], found)
    assert compared.error == 0 and compared.note == "1 tied rows compared by weight only, 1 tied rows left out"
    for row in (0, 2):  # an expert of a lower score, or one expert twice
        for wrong in ([0, 3], [0, 0]):
            experts = [[0, 1]] * 3
            experts[row] = wrong
            assert compare(first, _routings(first["w"], experts), [("w", "e")], found).error == math.inf


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
