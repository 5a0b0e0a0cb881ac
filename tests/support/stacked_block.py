"""A plain module with stacked experts, `Block`: what is exported where a whole model is not needed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import moec.passes.ir.ops  # noqa: F401  (registers torch.ops.moec)

E, K, H, F = 6, 2, 96, 64


class Block(nn.Module):
    """x [T, H] -> [T, V]: a router, stacked experts, a projection."""

    def __init__(self, act: str = "silu", inner: int = F) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.act = act
        self.router = nn.Parameter(torch.randn(E, H) * 0.3)
        self.w_in, self.w_out = (nn.Parameter(torch.randn(E, *s) * 0.2) for s in ((2 * inner, H), (H, inner)))
        self.head = nn.Linear(H, 16)

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = nn.functional.linear(x, self.router).softmax(-1).topk(K, -1)
        y = torch.ops.moec.experts(x, weights, experts.int(), self.w_in, self.w_out, None, None, None, self.act)
        return self.head(y)
