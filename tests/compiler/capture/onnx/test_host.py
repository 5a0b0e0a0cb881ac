"""Numbers of the host: short decimals that are the same float32, and integers as ONNX divides them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moec.compiler.capture.onnx import host
from moec.compiler.capture.onnx.elementwise import div


@pytest.mark.parametrize("meant", [1.702, 0.01, 1e-20, -7.0, 0.1 + 0.2])
def test_a_scalar_gets_the_number_that_was_meant(meant):
    stored = torch.tensor(meant, dtype=torch.float32)
    found = host.constant(stored)
    assert found == pytest.approx(meant, rel=1e-7)
    assert np.float32(found) == stored.numpy()
    assert len(repr(found)) <= 12


def test_the_largest_float32_stays_one():
    """As decimals it is rounded up, out of the range that torch takes."""
    largest = torch.finfo(torch.float32).min
    found = host.constant(torch.tensor(largest))
    assert torch.zeros(1).where(torch.tensor([False]), found).item() == largest


@pytest.mark.parametrize(("a", "b", "expected"), [(7, 2, 3), (-7, 2, -3), (1 << 60, 3, (1 << 60) // 3)])
def test_integers_are_divided_towards_zero(a, b, expected):
    assert div(a, b) == expected
    assert div(torch.tensor(a), b).item() == expected
