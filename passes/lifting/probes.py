"""Probe logits for gates: every kind of row on which two routers could differ."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_EACH = 12
NUM_ROWS = 14 * ROWS_EACH


def gate_logits(num_experts: int, dtype: torch.dtype) -> Tensor:
    """[NUM_ROWS, E]: normal at four scales, shifted far down and up, ties, negative, huge, one equal row, NaN rows.

    The far shifts tell the eps of a renormalisation (scores near 1e-4, 1e-9 and 0) from none.
    """
    generator = torch.Generator().manual_seed(20261122)

    def normal() -> Tensor:
        return torch.randn(ROWS_EACH, num_experts, generator=generator)

    one_nan = normal()
    one_nan[:, 0] = torch.nan
    rows = [
        normal() * 0.1,
        normal(),
        normal() * 3,
        normal() * 12,
        normal() - 9,
        normal() * 2 - 20,
        normal() - 200,
        normal() + 30,
        (normal() * 2).round(),
        -normal().abs() * 4,
        normal() * 3e4,
        torch.full((ROWS_EACH, num_experts), 0.5),
        one_nan,
        torch.full((ROWS_EACH, num_experts), torch.nan),
    ]
    return torch.cat(rows).to(dtype)
