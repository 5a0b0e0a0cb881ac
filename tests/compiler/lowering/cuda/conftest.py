"""Choices that a tiny model meets: few and many tokens part at 4, so that both ways run."""

import pytest

from moec.compiler.lowering.cuda import bind_attention, bind_experts

PART = 4


@pytest.fixture(autouse=True)
def few_is_four(monkeypatch):
    monkeypatch.setattr(
        bind_experts, "_kernels_us", lambda layer, arch, made, size, t: 1 if (t <= PART) == (size == "small") else 2
    )
    monkeypatch.setattr(bind_attention, "kernel_us", lambda arch, cost, launches: 1 if cost.num_bytes < LIMIT else 1e6)


LIMIT = (PART + 1) * bind_attention.CONTEXT * 256  # bytes that PART + 1 tokens read: 2 heads of 32 + 32 numbers
