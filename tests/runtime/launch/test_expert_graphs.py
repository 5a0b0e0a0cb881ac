"""The runtime's experts as graphs against the op's own meaning and against float64."""

from __future__ import annotations

import json

import pytest
import torch

import moec.passes.ir.expert_graphs  # noqa: F401  registers the op
from moec.runtime.errors import FormatError
from moec.runtime.launch.expert_graphs import expert_graphs

HIDDEN, WIDTH, EXPERTS = 8, 5, 3


def linear_body(experts: int = EXPERTS) -> dict[str, object]:
    """Every expert: tanh(rows @ its matrix [H,L])."""
    steps = [["aten.mm.default", [{"value": 0}, {"value": 1}], {}], ["aten.tanh.default", [{"value": 2}], {}]]
    graph = {"inputs": 1, "constants": 1, "states": 0, "steps": steps, "outputs": [3], "new_states": []}
    return {"graphs": [graph], "tensors": [[e] for e in range(experts)], "width": WIDTH}


def layer(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """9 tokens, two experts each, one index that is no expert, and expert 1 without tokens."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, HIDDEN, generator=g).to(dtype)
    index = torch.tensor([[0, 2], [2, 0]] * 4 + [[0, EXPERTS]], dtype=torch.int32)
    weights = torch.rand(9, 2, generator=g)
    matrices = [(torch.randn(HIDDEN, WIDTH, generator=g) * 0.3).to(dtype) for _ in range(EXPERTS)]
    return x, weights, index, matrices


# sums are float32 (float64 for float64): one rounding of the result and of each product's row in bfloat16, else none
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float64, 1e-14)]
)
def test_gives_the_weighted_sum_of_the_graphs(dtype: torch.dtype, tolerance: float) -> None:
    x, weights, index, matrices = layer(dtype)
    y = expert_graphs(linear_body())(x, weights, index, matrices)
    wanted = torch.zeros(9, WIDTH, dtype=torch.float64)
    for t in range(9):
        for k in range(2):
            if (e := int(index[t, k])) < EXPERTS:
                wanted[t] += weights[t, k].double() * torch.tanh(x[t].double() @ matrices[e].double())
    assert y.dtype == dtype and y.shape == (9, WIDTH)
    assert float((y.double() - wanted).abs().max()) <= tolerance * float(wanted.abs().max())
    twin = torch.ops.moec.expert_graphs(x, weights, index, matrices, json.dumps(linear_body()))
    torch.testing.assert_close(y, twin, rtol=tolerance, atol=tolerance)


def test_no_tokens() -> None:
    x, weights, index, matrices = layer(torch.float32)
    assert expert_graphs(linear_body())(x[:0], weights[:0], index[:0], matrices).shape == (0, WIDTH)


def test_a_body_of_too_few_graphs_is_refused() -> None:
    body = linear_body()
    body["graphs"] = body["graphs"] * 2  # type: ignore[operator]
    with pytest.raises(FormatError, match="2 graphs for 3 experts"):
        expert_graphs(body)
