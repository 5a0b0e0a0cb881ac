"""Fitted cost parameters, the rows they were fitted on, and predictions for such rows."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from importlib import resources

import numpy as np

from moec.passes.hardware.catalogue import named_mesh
from moec.passes.hardware.errors import PlacementError
from moec.passes.placement.build import build_layout
from moec.passes.placement.cost import CostParameters, StepModel
from moec.passes.placement.layout import Layout, Problem
from moec.passes.placement.serving import Workload, tokens_per_second
from moec.passes.placement.strategy import parse_strategy
from moec.passes.placement.weight_format import weight_format
from moec.passes.placement.zoo import zoo_shape


@dataclass(frozen=True)
class ServingRow:
    """One published measurement: a vendor's engine on an offline queue of equal requests."""

    model: str
    gpu: str
    num_gpus: int
    parallel: str
    weights: str
    input_len: int
    output_len: int
    num_requests: int
    output_tokens_per_s: float

    @staticmethod
    def from_strings(fields: dict[str, str]) -> ServingRow:
        """A row of the CSV form, whose columns have the same names."""
        f = fields
        numbers = (int(f["input_len"]), int(f["output_len"]), int(f["num_requests"]), float(f["output_tokens_per_s"]))
        return ServingRow(f["model"], f["gpu"], int(f["num_gpus"]), f["parallel"], f["weights"], *numbers)


@functools.cache
def calibration() -> dict:
    """The parsed data/cost_parameters.json: "parameters", "rows", "left_out" (one fit per GPU type) and "priors"."""
    return json.loads(resources.files("moec.passes.placement").joinpath("data/cost_parameters.json").read_text())


@functools.cache
def fitted_parameters() -> CostParameters:
    """The parameters fitted on all rows, with the error seen on rows left out."""
    return parameters_from_dict(calibration()["parameters"])


def parameters_from_dict(data: dict) -> CostParameters:
    """The inverse of parameters_to_dict. Raises: TypeError: a field is missing or unknown."""
    return CostParameters(**data)


def parameters_to_dict(params: CostParameters) -> dict:
    """As "parameters" stands in data/cost_parameters.json."""
    return asdict(params)


def row_case(row: ServingRow) -> tuple[Layout, Workload]:
    """The layout and workload of a published row; fp8 rows keep their cache in fp8 as that engine does."""
    shape = zoo_shape(row.model)
    if shape is None:
        raise PlacementError(f"serving row: model '{row.model}' is not in the zoo")
    fp8 = row.weights == "fp8"
    mesh = named_mesh(f"{row.gpu.lower()}x{row.num_gpus}")
    problem = Problem(shape, mesh, weight_format("fp8" if fp8 else "bf16"), kv_bytes=1.0 if fp8 else 2.0)
    strategy = parse_strategy(row.parallel)
    dealt = (shape.num_layers, shape.moe.num_experts, strategy.expert_groups)
    if strategy.expert_groups != 1 or strategy.stages != 1:
        raise PlacementError(
            f"serving row: {row.parallel} is not plain tensor parallelism, which is all that is calibrated"
        )
    layout = build_layout(problem, strategy, [0, shape.num_layers], np.ones(dealt, dtype=bool), np.ones(dealt))
    return layout, Workload(row.input_len, row.output_len, row.num_requests)


def predict_row(case: tuple[Layout, Workload], params: CostParameters) -> float:
    """Predicted output tokens per second of a published row, with evenly used experts."""
    layout, workload = case
    moe_experts = layout.problem.shape.moe.num_experts
    popularity = np.full((layout.problem.shape.num_layers, moe_experts), 1.0 / moe_experts)
    model = StepModel(layout, params, popularity)
    return tokens_per_second(model.seconds, layout.kv_tokens() / workload.total_len, workload)
