"""Choices that a tiny model meets: one launch up to 2 tokens, few and many part at 4, so that all ways run."""

import pytest

from moec.compiler.lowering.cuda import bind_attention, bind_decode, bind_experts, bind_layers

ONE_LAUNCH, PART = 2, 4


def kernels_us(layer, arch, made, size, tokens):
    """Few tokens are for the small kernels, and atomic sums are better where they may be taken."""
    return (1 if (tokens <= PART) == (size == "small") else 2) - ("finish" in made.kernels) / 4


@pytest.fixture
def real_predictions():
    """Leaves the choice to the cost model."""


@pytest.fixture(autouse=True)
def few_is_four(request, monkeypatch):
    if "real_predictions" in request.fixturenames:
        return
    monkeypatch.setattr(bind_experts, "_kernels_us", kernels_us)
    monkeypatch.setattr(bind_decode, "_decode_us", lambda layer, router, problem, arch, t: (t > ONE_LAUNCH) * 10 + 0.5)
    monkeypatch.setattr(bind_layers, "router_us", lambda arch, tokens, waits, num_bytes: 1e6 * (tokens > PART))
    monkeypatch.setattr(bind_attention, "kernel_us", lambda arch, cost, launches: 1 if cost.num_bytes < LIMIT else 1e6)


LIMIT = (PART + 1) * bind_attention.CONTEXT * 256  # bytes that PART + 1 tokens read: 2 heads of 32 + 32 numbers
