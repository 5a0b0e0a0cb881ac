"""A small MoE block around a gate or an experts form, as a graph under test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gate_spellings import SPELLINGS, E, K, Route
from passing import Case, function_case
from torch import Tensor
from torch.nn import functional as F

T, H, WIDTH = 9, 16, 24  # WIDTH: F, the experts' inner width


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """router [E, H], bias [E] (selection), w_in [E, 2F, H], w_out [E, H, F], b_in [E, 2F], b_out [E, H]; seeded.

    gate_<e> and up_<e> [F, H], down_<e> [H, F]: the same kind of experts with parameters of their own.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / 2).to(dtype)

    shapes = {"gate": (WIDTH, H), "up": (WIDTH, H), "down": (H, WIDTH)}
    separate = {f"{kind}_{e}": normal(*shape) for e in range(E) for kind, shape in shapes.items()}
    return separate | {
        "router": normal(E, H) * 2,
        "bias": torch.rand(E, generator=generator) * 0.3,
        "w_in": normal(E, 2 * WIDTH, H),
        "w_out": normal(E, H, WIDTH),
        "b_in": normal(E, 2 * WIDTH),
        "b_out": normal(E, H),
    }


def hidden(*leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded hidden states [.., H], [T, H] without an argument."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(leading or (T,)), H, generator=generator).to(dtype)


def experts_op(m: Any, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """moec::experts with SiLU on the block's weights."""
    return torch.ops.moec.experts(x, weights, experts, m.w_in, m.w_out, None, None, None, "silu")


def gate_case(route: Route | str, dtype: torch.dtype = torch.float32) -> Case:
    """linear -> route -> moec::experts; a name is one of gate_spellings.SPELLINGS."""
    function = SPELLINGS[route][0] if isinstance(route, str) else route

    def forward(m: Any, x: Tensor) -> Tensor:
        return experts_op(m, x, *function(m, F.linear(x, m.router)))

    return function_case(forward, hidden(dtype=dtype), **parameters(dtype))


def softmax_route(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The routing in front of the experts forms: softmax, top-k, renormalised."""
    weights, experts = F.linear(x, m.router).float().softmax(-1).topk(K)
    return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), experts


def experts_case(forward: Callable[[Any, Tensor], Tensor], dtype: torch.dtype = torch.float32, *leading: int) -> Case:
    """A block whose experts are spelled out by `forward`."""
    return function_case(forward, hidden(*leading, dtype=dtype), **parameters(dtype))
