"""bf16-packed: every number comes back, and what has too many exceptions is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moec.passes.ir import packed

pytestmark = pytest.mark.null


def normal(*shape: int) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.02).bfloat16()


def with_corners() -> Tensor:
    """A row of zeros, one of subnormal numbers, the smallest and the largest exponents, both signs of 0."""
    w = normal(64, 96)
    w[0] = 0
    w[1], w[1, 0] = 0, 1e-39
    w[2], w[3] = 2.0**-126, -3.0e38
    w[4, :4] = torch.tensor([0.0, -0.0, 1e-39, -1e-30])
    w[5, 0], w[6] = 1e30, torch.exp2(torch.arange(96) % 16 - 7.0)
    return w


@pytest.mark.parametrize("w", [normal(96, 512), with_corners(), normal(3, 0)])
def test_every_number_comes_back(w: Tensor) -> None:
    made = packed.pack(w)
    exponents = made.codes >> 7 & 0xFF
    assert not w.numel() or (int(exponents.min()) >= 112 and int(exponents.max()) <= 127)
    meant = (made.codes << 16).view(torch.float32) * made.scales[:, None]
    assert torch.equal(torch.where(made.exceptions, w.float(), meant).bfloat16(), w)
    assert (made.codes[made.exceptions] << 16).view(torch.float32).eq(packed.SMALLEST).all()


def test_numbers_that_are_normally_distributed_have_few_exceptions() -> None:
    w = normal(512, 2048)
    share = packed.pack(w).exceptions.double().mean().item()
    assert 2e-5 < share < 2e-4
    assert packed.refusal(w) is None and packed.refusal(with_corners()[6:]) is None


def test_what_has_no_room_is_refused() -> None:
    pruned = torch.where(torch.rand(64, 2048, generator=torch.Generator().manual_seed(0)) < 0.01, 0, normal(64, 2048))
    zeros = (pruned == 0).sum(1).topk(32).values.sum()
    assert zeros > packed.room(2048) == 135
    assert "of 65,536 numbers in 32 rows are 0 or under 2**-15" in str(packed.refusal(pruned))
    assert "bf16-packed has room for 135" in str(packed.refusal(pruned))
    full = normal(32, 2048)
    exceptions = packed.pack(full).exceptions.flatten()
    small = (~exceptions & (full.flatten().abs() < 0.01)).nonzero().flatten()  # no row's largest
    count = packed.room(2048) - int(exceptions.sum())
    full.view(-1)[small[:count]] = 0
    assert packed.refusal(full) is None
    full.view(-1)[small[count]] = 0
    assert "136 of 65,536 numbers" in str(packed.refusal(full))
