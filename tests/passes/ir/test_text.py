"""The dump: types, letters for symbolic sizes, layers, weights and their recipes."""

from __future__ import annotations

import pytest
import torch
from graphs import Builder

from moec.passes.ir.text import graph_text

aten = torch.ops.aten


@pytest.mark.null
def test_dump() -> None:
    b = Builder()
    x, w = b.input("x", 4, dtype=torch.bfloat16), b.weight("w", 8, 4, dtype=torch.bfloat16)
    y = b(aten.linear.default, x, w)
    y.meta["layer"] = 0
    top = b(aten.topk.default, y, 2)
    top.meta["layer"] = 0
    z = b(aten.to.dtype, y, torch.float32)
    assert graph_text(b.done(z)) == (
        "graph(x: bf16[T, 4]):\n"
        "  # layer 0\n"
        "  linear_default: bf16[T, 8] = aten.linear(x, w)\n"
        "  topk_default: (bf16[T, 2], i64[T, 2]) = aten.topk(linear_default, 2)\n"
        "  # outside layers\n"
        "  to_dtype: f32[T, 8] = aten.to.dtype(linear_default, torch.float32)\n"
        "  return to_dtype\n"
        "weights:\n"
        "  w: bf16[8, 4] = w\n"
    )


@pytest.mark.null
def test_letters_given_by_capture() -> None:
    b = Builder()
    x = b.input("x", 4)
    gm = b.done(b(aten.relu.default, x))
    gm.meta["symbols"] = {str(x.meta["val"].shape[0].node.expr): "B"}
    assert graph_text(gm).startswith("graph(x: f32[B, 4]):")
