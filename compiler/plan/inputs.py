"""Reads what a plan is made from: a model's sizes, a mesh, a trace. Every mistake becomes one PlanError."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moec.compiler.errors import CompileError
from moec.compiler.plan.config import shape_from_config
from moec.passes.hardware.catalogue import mesh_from_dict, named_mesh
from moec.passes.hardware.errors import PlacementError
from moec.passes.hardware.mesh import Mesh
from moec.passes.placement.measured import TimesTable
from moec.passes.placement.model_shape import ModelShape
from moec.passes.placement.routing import RoutingTrace, trace_from_dict, zipf_trace
from moec.passes.placement.zoo import ZOO, zoo_shape
from moec.runtime.errors import EngineError
from moec.runtime.routing import FORMAT, read_routing


class PlanError(CompileError):
    """A plan cannot be made as asked."""


@contextmanager
def plan_errors() -> Iterator[None]:
    """Turns what the planner refuses into PlanError."""
    try:
        yield
    except PlacementError as error:
        raise PlanError(str(error)) from error


def read_model(model: str, trust_remote_code: bool = False) -> ModelShape:
    """The sizes of `zoo:NAME` or of a directory (or file) with a Hugging Face config.json.

    trust_remote_code: let the directory's own configuration class fill in what config.json leaves out.
    """
    if model.startswith("zoo:"):
        shape = zoo_shape(model[4:])
        if shape is None:
            names = ", ".join(s.name for s in ZOO)
            raise PlanError(f"{model}: no such zoo model; expected zoo: and one of {names}")
        return shape
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise PlanError(f"{model}: expected zoo:NAME or a directory with config.json; there is no {file}")
    config = _json(file)
    if not isinstance(config, dict):
        raise PlanError(f"{file}: expected a JSON object of configuration values, got {type(config).__name__}")
    if trust_remote_code and config.get("auto_map") and path.is_dir():
        from moec.compiler.capture.configuration import load_config

        config = config | load_config(path, trust_remote_code=True).to_dict()
    shape = shape_from_config(config, path.name if path.is_dir() else path.parent.name)
    if not any(c.moe for c in shape.layers):
        raise PlanError(
            f"{file}: the model has no Mixture-of-Experts layer (no num_experts or its like); plan is for MoE models"
        )
    return shape


def read_mesh(mesh: str | Mesh) -> Mesh:
    """A mesh by name (rtx4090x8, h100x8x2) or from a .json file."""
    if isinstance(mesh, Mesh):
        return mesh
    with plan_errors():
        if mesh.endswith(".json"):
            return mesh_from_dict(_json(Path(mesh)), mesh)
        return named_mesh(mesh)


def read_trace(trace: str | Path | RoutingTrace | None, shape: ModelShape, zipf: float) -> RoutingTrace:
    """A recorded trace, or synthetic Zipf use of the experts where there is none.

    trace: a file of `moec trace`, or counts that were written by hand: {"counts": [[..] per MoE layer]}.
    """
    if isinstance(trace, RoutingTrace):
        return trace
    with plan_errors():
        if trace is None:
            return zipf_trace(shape, zipf)
        data = _json(Path(trace))
        if isinstance(data, dict) and data.get("format") == FORMAT:
            _check_recorded(Path(trace))
        return trace_from_dict(data, shape, str(trace))


def _check_recorded(file: Path) -> None:
    """Raises: PlanError: of a newer version, or its parts do not fit together."""
    try:
        read_routing(file)
    except EngineError as error:
        raise PlanError(str(error)) from error


def read_times(file: Path) -> dict[str, TimesTable]:
    """Measured kernel times: {"h100": {"times": [..]}, ..}."""
    data = _json(file)
    if not isinstance(data, dict):
        raise PlanError(f"{file}: expected an object with a table of times per device, got {type(data).__name__}")
    with plan_errors():
        return {name: TimesTable(table, f"{file}: {name}") for name, table in data.items()}


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise PlanError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise PlanError(f"{file}: is not JSON ({error})") from error
