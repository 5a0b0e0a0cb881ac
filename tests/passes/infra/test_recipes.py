"""Recipes read from constant graphs make the tensors that the graphs compute."""

from __future__ import annotations

import pytest
import torch
from graphs import Builder, tensors

from moec.passes.infra.recipes import recipe_of
from moec.passes.ir.evaluate import evaluate
from moec.passes.ir.weights import weights_of

aten = torch.ops.aten
CHAINS = {
    "transpose": lambda b, w, v: b(aten.transpose.int, w, -2, -1),
    "permute": lambda b, w, v: b(aten.permute.default, w, [2, 0, 1]),
    "slice with step": lambda b, w, v: b(aten.slice.Tensor, w, 1, 1, 9223372036854775807, 2),
    "negative slice": lambda b, w, v: b(aten.slice.Tensor, w, -1, -3, -1),
    "select": lambda b, w, v: b(aten.select.int, w, 0, -1),
    "half of a chunk": lambda b, w, v: b(__import__("operator").getitem, b(aten.chunk.default, w, 2, 1), 1),
    "one of unbind": lambda b, w, v: b(__import__("operator").getitem, b(aten.unbind.int, w, 2), 3),
    "stack of both": lambda b, w, v: b(aten.stack.default, [w, v, w]),
    "cat of both": lambda b, w, v: b(aten.cat.default, [v, w], -1),
    "cast and view": lambda b, w, v: b(aten.view.default, b(aten.to.dtype, w, torch.bfloat16), [6, 20]),
}


def _graph(chain: str):
    b = Builder()
    w, v = b.weight("w", 3, 8, 5), b.weight("v", 3, 8, 5)
    out = CHAINS[chain](b, w, v)
    return b.done(out), out


@pytest.mark.null
@pytest.mark.parametrize("chain", CHAINS)
def test_recipes_make_what_the_graph_computes(chain: str) -> None:
    gm, out = _graph(chain)
    read = tensors(w=torch.randn(3, 8, 5), v=torch.randn(3, 8, 5))
    recipe = recipe_of(out, weights_of(gm))
    assert recipe is not None and recipe.shape == tuple(out.meta["val"].shape)
    assert torch.equal(recipe.materialise(read), evaluate(gm, (), read))


@pytest.mark.null
def test_arithmetic_is_no_recipe() -> None:
    b = Builder()
    w, x = b.weight("w", 3, 8, 5), b.input("x", 8)
    scaled, moving = b(aten.mul.Tensor, w, 2.0), b(aten.transpose.int, x, 0, 1)
    gm = b.done(scaled, moving)
    assert recipe_of(scaled, weights_of(gm)) is None and recipe_of(moving, weights_of(gm)) is None
