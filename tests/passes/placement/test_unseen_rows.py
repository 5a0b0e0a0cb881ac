"""What the throughput model says of rows that nobody published: it must be physical, and move the way serving does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moec.passes.hardware.catalogue import named_mesh
from moec.passes.placement.build import build_layout
from moec.passes.placement.calibration import ServingRow, fitted_parameters, predict_row, row_case
from moec.passes.placement.cost import StepLoad, StepModel
from moec.passes.placement.layout import Problem
from moec.passes.placement.strategy import parse_strategy
from moec.passes.placement.weight_format import weight_format
from moec.passes.placement.zoo import zoo_shape

MODELS = ("mixtral-8x7b", "mixtral-8x22b", "deepseek-moe-16b", "grok-1", "xverse-moe-a4.2b")
GPUS = ("L40S", "A100", "H100", "H200", "B200")


def rate(model="mixtral-8x7b", gpu="H100", gpus=8, weights="fp8", lengths=(777, 333), requests=3000) -> float:
    row = ServingRow(model, gpu, gpus, f"TP{gpus}", weights, *lengths, requests, 1.0)
    return predict_row(row_case(row), fitted_parameters())


def step_model(model: str, gpu: str, gpus: int, weights: str) -> StepModel:
    shape = zoo_shape(model)
    problem = Problem(shape, named_mesh(f"{gpu.lower()}x{gpus}"), weight_format(weights))
    dealt = (shape.num_layers, shape.moe.num_experts, 1)
    layout = build_layout(
        problem, parse_strategy(f"TP{gpus}"), [0, shape.num_layers], np.ones(dealt, bool), np.ones(dealt)
    )
    even = np.full((shape.num_layers, shape.moe.num_experts), 1 / shape.moe.num_experts)
    return StepModel(layout, fitted_parameters(), even)


def rising(values: list[float]) -> bool:
    return all(b >= a for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("model", MODELS)
def test_batch(model):
    """More sequences in a step: the step takes longer, and each token less."""
    made = step_model(model, "H200", 8, "bf16")
    for context in (100, 3000):
        steps = [made.seconds(StepLoad(n, context)) for n in (1, 2, 7, 33, 100, 513, 2000)]
        assert rising(steps)
        assert rising([n / s for n, s in zip((1, 2, 7, 33, 100, 513, 2000), steps, strict=True)])
        # eight times the sequences never give more than eight times the tokens
        assert steps[1] <= steps[4] <= 50 * steps[1]


@pytest.mark.parametrize("weights", ["fp8", "fp16"])
@pytest.mark.parametrize("gpu", ["A100", "H100", "H200"])
def test_prompt_length(gpu, weights):
    """Longer prompts leave less time and room for outputs."""
    rates = [rate(gpu=gpu, weights=weights, lengths=(n, 300)) for n in (60, 200, 500, 1000, 3000, 7000)]
    assert rising(rates[::-1])


@pytest.mark.parametrize("model", MODELS[:3])
def test_more_gpus(model):
    """Twice the devices over NVLink are faster; not more than twice as fast where one step's sequences are the same."""
    assert rising([rate(model, gpus=n) for n in (2, 4, 8)])
    one, two, four = (step_model(model, "H100", n, "fp8").seconds(StepLoad(64, 500)) for n in (2, 4, 8))
    assert two <= one <= 2 * two and four <= two <= 2 * four


@pytest.mark.parametrize("model", MODELS[:3])
def test_faster_devices(model):
    assert rising([rate(model, gpu, weights="fp16") for gpu in GPUS])


@pytest.mark.parametrize("gpu", ["H100", "H200"])
def test_narrower_weights(gpu):
    """Half the bytes: faster at every batch where weights are read, and at most twice as fast."""
    for n in (1, 8, 64, 512):
        wide, narrow = (step_model("mixtral-8x22b", gpu, 8, w).seconds(StepLoad(n, 400)) for w in ("bf16", "fp8"))
        assert narrow <= wide <= 2 * narrow


def test_larger_models_are_slower():
    """By active parameters, at the batch where these decide: prompts."""
    order = sorted(MODELS, key=lambda m: -zoo_shape(m).active_params())
    speeds = [1 / step_model(m, "H200", 8, "bf16").seconds(StepLoad(0, 0, 8192, 512)) for m in order]
    assert rising(speeds)


@pytest.mark.parametrize("gpu", ["A100", "H200"])
@pytest.mark.parametrize("model", MODELS)
def test_never_faster_than_the_hardware(model, gpu):
    """A step reads at least what its tokens touch, and multiplies at least their active parameters."""
    made, shape = step_model(model, gpu, 8, "bf16"), zoo_shape(model)
    device = made.layout.problem.mesh.devices[0]
    for tokens in (1, 64, 4096):
        flops = 2.0 * (shape.active_params() - shape.vocab * shape.hidden * 2) * tokens
        assert made.seconds(StepLoad(0, 0, tokens, 1)) >= flops / (8 * device.flops["bf16"])
    touched = 2.0 * (shape.active_params() - shape.vocab * shape.hidden)
    assert made.seconds(StepLoad(1, 1)) >= touched / (8 * device.bytes_per_s)
