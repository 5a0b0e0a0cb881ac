"""Evaluation: weights by recipe, random stand-ins, devices of the trace, errors with the node's name."""

from __future__ import annotations

import pytest
import torch
from graphs import Builder, tensors

from moec.passes.ir import evaluate as evaluating
from moec.passes.ir.evaluate import evaluate, random_weight
from moec.passes.ir.weights import concat, slice_, source, transpose

aten = torch.ops.aten


def _linear():
    b = Builder()
    x, w = b.input("x", 4), b.weight("w", 3, 4)
    return b.done(b(aten.linear.default, x, w))


@pytest.mark.null
def test_evaluates_with_real_weights() -> None:
    x, w = torch.randn(2, 4), torch.randn(3, 4)
    assert torch.equal(evaluate(_linear(), (x,), tensors(w=w)), x @ w.T)


@pytest.mark.null
@pytest.mark.parametrize("shape", [(6, 5, 8), (3, 7), (7 * 16 + 5,), (4, 4)])
def test_random_weights_are_the_same_in_parts(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks of experts are made part by part; what they are made of does not depend on it."""
    whole = random_weight(source("w", shape, torch.bfloat16))
    monkeypatch.setattr(evaluating, "CHUNK_VALUES", 32)
    assert torch.equal(random_weight(source("w", shape, torch.bfloat16)), whole)
    assert whole.unique().numel() > whole.numel() // 2


@pytest.mark.null
def test_random_weights_repeat_and_follow_the_recipe() -> None:
    x = torch.randn(2, 4)
    assert torch.equal(evaluate(_linear(), (x,)), evaluate(_linear(), (x,)))
    w = source("w", (6, 4), torch.float32)
    swapped = concat([slice_(w, 0, 3, 6), slice_(w, 0, 0, 3)], 0)
    assert torch.equal(random_weight(swapped), random_weight(w).roll(3, 0))


@pytest.mark.null
def test_the_device_of_the_trace_becomes_the_cpu() -> None:
    b = Builder()
    x = b.input("x", 4)
    ones = b.gm.graph.call_function(aten.ones.default, ([4],), {"device": torch.device("meta")})
    ones.meta["val"] = torch.empty(4, device="meta")
    gm = b.done(b.gm.graph.call_function(aten.add.Tensor, (x, ones)))
    assert torch.equal(evaluate(gm, (torch.zeros(2, 4),)), torch.ones(2, 4))


@pytest.mark.null
def test_an_error_names_the_node() -> None:
    with pytest.raises(RuntimeError) as caught:
        evaluate(_linear(), (torch.zeros(2, 5),), tensors(w=torch.zeros(3, 4)))
    assert any("while evaluating linear" in note for note in caught.value.__notes__)


@pytest.mark.null
def test_wrong_number_of_inputs() -> None:
    with pytest.raises(ValueError, match=r"the graph takes 1 inputs \(x, \.\.\), got 2"):
        evaluate(_linear(), (torch.zeros(2, 4), torch.zeros(2, 4)))


@pytest.mark.null
def test_a_stack_that_is_turned_twice_is_not_copied() -> None:
    w, given = source("w", (2, 3, 4), torch.float32), torch.randn(2, 3, 4)
    assert transpose(transpose(w, 1, 2), -1, -2).materialise(lambda _: given) is given
    once = transpose(transpose(w, 1, 2), 0, 1).materialise(lambda _: given)
    assert torch.equal(once, given.transpose(1, 2).transpose(0, 1))


@pytest.mark.null
@pytest.mark.parametrize("where", [(0, 1, 5, 2), (1, 0, 6, 1), (2, 1, 7, 3), (-1, 0, 4, 1), (1, 4, 0, -1)])
def test_slices_are_copies_of_rows_in_their_order(where: tuple[int, int, int, int]) -> None:
    given, (dim, *ends) = torch.randn(5, 6, 7), where
    found = slice_(source("w", (5, 6, 7), torch.float32), *where).materialise(lambda _: given)
    assert torch.equal(found, given.index_select(dim, torch.arange(*ends)))
    assert found.is_contiguous() and found.data_ptr() != given.data_ptr()
