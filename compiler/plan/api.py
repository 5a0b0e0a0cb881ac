"""moec.plan: how to spread a model over a mesh, how fast it will be, and a certificate."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.plan.inputs import PlanError, plan_errors, read_mesh, read_model, read_trace
from moec.passes.hardware.mesh import Mesh
from moec.passes.placement.alternatives import fitting_format, fitting_meshes
from moec.passes.placement.calibration import fitted_parameters
from moec.passes.placement.capacity import check_factor, predict_drops
from moec.passes.placement.measured import KernelTimes, measured_json, with_measured
from moec.passes.placement.model_shape import ModelShape
from moec.passes.placement.plan_document import plan_document
from moec.passes.placement.routing import RoutingTrace
from moec.passes.placement.search import PlanRequest, SearchResult, popularity_by_layer, search
from moec.passes.placement.serving import Workload
from moec.passes.placement.strategy import enumerate_strategies, parse_strategy
from moec.passes.placement.verify import verify_plan
from moec.passes.placement.weight_format import weight_format

DEFAULT_ZIPF = 0.4


@dataclass(frozen=True)
class Plan:
    """A plan, or the proof that there is none.

    Args:
        result: the search behind it; document: plan.json.
    """

    result: SearchResult
    document: dict[str, Any]

    @property
    def feasible(self) -> bool:
        """Whether there is a plan; where there is none, the document says what does not fit."""
        return self.result.best is not None

    def verify(self) -> list[str]:
        """What the independent verifier finds wrong; empty for a plan that holds."""
        return verify_plan(self.document)

    def save(self, path: str | Path) -> None:
        """Writes plan.json."""
        Path(path).write_text(json.dumps(self.document) + "\n")


def plan(
    model: str | ModelShape,
    mesh: str | Mesh,
    weights: str = "bf16",
    *,
    batch: int = 0,
    prompt_len: int = 128,
    gen_len: int = 128,
    num_requests: int = 0,
    strategy: str | None = None,
    trace: str | Path | RoutingTrace | None = None,
    zipf: float = DEFAULT_ZIPF,
    capacity: float | None = None,
    kv: str = "auto",
    trust_remote_code: bool = False,
    times: Mapping[str, KernelTimes] | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Plan:
    """Plans a model on a mesh.

    Args:
        model: zoo:NAME, a directory with config.json, or sizes. mesh: a name or a .json file.
        batch: sequences in flight; 0 for the best sustained throughput.
        num_requests: length of the queue; 0 for one that never empties.
        kv: format of the cache; "auto" is fp8 for fp8 weights with a finite queue (the benchmarks that are fitted
            run so), else bf16.
        trace: recorded expert use; without it experts are used by a Zipf law of exponent `zipf`.
        capacity: predicts what a capacity factor would drop; nothing is dropped by a plan.
        times: measured kernel times by device name, which the cost model takes before its fitted efficiencies.
        trust_remote_code: of a directory: import the code that its config.json names (auto_map), for its sizes.

    Raises:
        PlanError: any of the inputs is wrong; the message is one line.
    """
    _check(batch, prompt_len, gen_len, num_requests, zipf, kv)
    shape = model if isinstance(model, ModelShape) else read_model(model, trust_remote_code)
    where, workload = read_mesh(mesh), Workload(prompt_len, gen_len, num_requests)
    routing = read_trace(trace, shape, zipf)
    with plan_errors(), quiet_solver():
        asked = parse_strategy(strategy) if strategy else None
        fmt = weight_format(weights)
        devices = {d.name: d for d in where.devices}
        params, used = with_measured(fitted_parameters(), shape, fmt, devices, times or {})
        factor = None if capacity is None else check_factor(capacity)
        kv_bytes = 1.0 if _fp8_cache(kv, weights, num_requests) else 2.0
        request = PlanRequest(shape, where, fmt, workload, routing, params, batch, kv_bytes, asked)
        total, done = 1 if asked else len(enumerate_strategies(shape, where)), iter(range(1, 1 << 30))
        result = search(request, lambda _: progress("strategies", next(done), total))
        document = plan_document(result) | {"measured": measured_json(used)}
        if result.best is None:
            document["fits"] = {"weights": fitting_format(request), "meshes": fitting_meshes(request)}
        elif factor is not None:
            document["capacity"] = _capacity(result, factor)
    return Plan(result, document)


def _check(batch: int, prompt_len: int, gen_len: int, num_requests: int, zipf: float, kv: str) -> None:
    """Raises: PlanError: a number or the cache's format has no meaning."""
    counts = (("batch", batch, 0), ("prompt-len", prompt_len, 1), ("gen-len", gen_len, 1))
    for name, value, least in (*counts, ("num-requests", num_requests, 0)):
        if value < least:
            raise PlanError(f"--{name} is {value}; expected at least {least}")
    if not 0 <= zipf <= 4:
        raise PlanError(f"--zipf is {zipf}; expected an exponent from 0 (even) to 4")
    if kv not in ("auto", "bf16", "fp8"):
        raise PlanError(f"--kv is '{kv}'; expected auto, bf16 or fp8")


def _fp8_cache(kv: str, weights: str, num_requests: int) -> bool:
    """Whether the cache is fp8: "auto" follows the published offline benchmarks, which keep it in fp8 with fp8 weights,
    where such a finite queue is asked for, and serving engines' bf16 otherwise."""
    return kv == "fp8" or (kv == "auto" and weights == "fp8" and num_requests > 0)


def _capacity(result: SearchResult, factor: float) -> dict[str, float]:
    best, request = result.best, result.request
    if best is None or best.layout is None:
        raise ValueError("capacity needs a plan")
    moe = np.array([request.shape.layer_class(i).moe is not None for i in range(request.shape.num_layers)])
    sequences = request.batch or best.kv_tokens / request.workload.total_len
    slots = max(sequences, 1) * request.shape.moe.top_k
    drops = predict_drops(popularity_by_layer(request)[moe], best.layout.token_share[moe], slots, factor)
    return {"factor": factor, "dropped_per_expert": drops.per_expert, "dropped_per_device": drops.per_device}


@contextmanager
def quiet_solver() -> Iterator[None]:
    """Sends what native code prints on standard output to standard error: HiGHS writes notes that would break
    --json."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # no standard output to protect
        yield
        return
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
