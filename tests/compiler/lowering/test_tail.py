from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moec.compiler.lowering.tail import output_tail


class Head(nn.Module):
    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.norm, self.head = nn.Linear(4, 4), nn.Linear(4, 8)
        self.spelling = spelling

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.norm(x)
        y = self.head(h)
        if self.spelling == "scaled and capped":
            y = torch.tanh(y / 30.0) * 30.0
        if self.spelling == "rows mixed":
            y = y - y.mean(0)
        if self.spelling == "softmax":
            y = y.softmax(0)
        return (y, y + 1) if self.spelling == "two outputs" else (y,)


@pytest.mark.parametrize(("spelling", "length"), [("plain", 1), ("scaled and capped", 4)])
def test_finds_the_tail(spelling: str, length: int) -> None:
    graph = torch.export.export(Head(spelling), (torch.randn(3, 4),)).graph
    tail = output_tail(graph)
    assert len(tail) == length
    assert tail[0].target is torch.ops.aten.linear.default and tail[0].args[0].target is torch.ops.aten.linear.default


@pytest.mark.parametrize("spelling", ["rows mixed", "softmax", "two outputs"])
def test_leaves_other_ends_alone(spelling: str) -> None:
    assert output_tail(torch.export.export(Head(spelling), (torch.randn(3, 4),)).graph) == []
