"""Every test begins and ends without compiled code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """torch.compiler's caches and records are empty, and the seed is 0."""
    torch.compiler.reset()
    torch.manual_seed(0)
    yield
    torch.compiler.reset()
