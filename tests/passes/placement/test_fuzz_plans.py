"""Random models, meshes and formats: no crash, no plan that the verifier rejects, every refusal explained.

`make test` runs 200; `python tests/passes/placement/test_fuzz_plans.py 10000` (make fuzz-placement) runs as many as
asked.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest

from moec.passes.hardware.catalogue import DEVICES
from moec.passes.hardware.device import Device
from moec.passes.hardware.errors import PlacementError
from moec.passes.hardware.mesh import Link, Mesh
from moec.passes.placement.calibration import fitted_parameters
from moec.passes.placement.model_shape import Attention, DenseFfn, LayerClass, ModelShape, MoeFfn
from moec.passes.placement.plan_document import plan_document
from moec.passes.placement.routing import RoutingTrace, num_moe_layers, sample_trace, zipf_logits
from moec.passes.placement.search import PlanRequest, search
from moec.passes.placement.serving import Workload
from moec.passes.placement.strategy import Strategy, enumerate_strategies
from moec.passes.placement.verify import verify_plan
from moec.passes.placement.weight_format import FORMATS


def random_shape(rng: np.random.Generator) -> ModelShape:
    hidden = int(rng.choice([48, 64, 256, 2560, 2880, 4096, 7168]))
    kv_heads = int(rng.integers(1, 13))
    heads = kv_heads * int(rng.integers(1, 9))
    attention = Attention(
        heads, kv_heads, int(rng.choice([16, 64, 80, 96, 128, 192])), qk_norm_params=int(rng.choice([0, 256]))
    )
    if rng.random() < 0.2:
        attention = Attention(heads, heads, 128, int(rng.choice([0, 256])), 512, 64, 128)
    experts = int(rng.integers(1, 70))
    width = int(rng.choice([8, 20, 64, 216, 768, 1408, 1728, 2880, 10944, 14336, 20480]))
    shared = width * int(rng.choice([0, 0, 1, 2]))
    moe = MoeFfn(experts, int(rng.integers(1, min(experts, 8) + 1)), width, shared, router_bias=bool(rng.integers(2)))
    classes = [LayerClass(int(rng.integers(1, 7)), attention, moe=moe, num_norms=int(rng.choice([2, 4])))]
    if rng.random() < 0.4:
        classes.insert(0, LayerClass(int(rng.integers(1, 3)), attention, dense=DenseFfn(width * 4)))
    return ModelShape("random", hidden, int(rng.integers(1, 131072)), tuple(classes), bool(rng.integers(2)))


def random_mesh(rng: np.random.Generator) -> Mesh:
    count = int(rng.choice([1, 2, 3, 4, 5, 6, 8]))
    named = list(DEVICES.values())
    devices = [named[int(rng.integers(len(named)))]] * count
    if rng.random() < 0.4:
        devices = [named[int(i)] for i in rng.integers(len(named), size=count)]
    if rng.random() < 0.5:  # little memory, so that much does not fit
        small = float(10 ** rng.uniform(-3, 0))
        devices = [
            Device(d.name, int(1.2e9 + d.memory_bytes * small * 0.3), d.bytes_per_s, d.flops, d.source) for d in devices
        ]
    link = Link(str(rng.choice(["nvlink", "pcie"])), 1e-5, float(10 ** rng.uniform(9, 11.7)), "random")
    nodes = count // 2 if count in (4, 6, 8) and rng.random() < 0.3 else 0
    between = Link("network", 5e-5, 2e10, "random") if nodes else None
    return Mesh("random", tuple(devices), link, between, nodes)


def random_trace(rng: np.random.Generator, shape: ModelShape) -> RoutingTrace:
    layers, moe = num_moe_layers(shape), shape.moe
    if rng.random() < 0.1:  # layers that were never used, and experts that take everything
        counts = np.zeros((layers, moe.num_experts), dtype=int)
        counts[0, 0] = 100
        return RoutingTrace(counts, "degenerate")
    logits = zipf_logits(layers, moe.num_experts, float(rng.uniform(0, 2)), int(rng.integers(1 << 30)))
    return sample_trace(logits, moe.top_k, 256, int(rng.integers(1 << 30)))


def random_request(seed: int) -> PlanRequest:
    rng = np.random.default_rng(seed)
    shape, mesh = random_shape(rng), random_mesh(rng)
    weights = list(FORMATS.values())[int(rng.integers(len(FORMATS)))]
    workload = Workload(int(rng.integers(1, 3000)), int(rng.integers(1, 3000)))
    batch = int(rng.choice([0, 0, 1, 7, 64]))
    strategy = None
    if rng.random() < 0.75:  # one strategy of the space; the others search all of it
        every = enumerate_strategies(shape, mesh)
        strategy = every[int(rng.integers(len(every)))]
    fitted = fitted_parameters()
    return PlanRequest(
        shape, mesh, weights, workload, random_trace(rng, shape), fitted, batch, float(rng.choice([1, 2])), strategy
    )


def check(seed: int) -> str:
    """Plans one instance and checks it; returns "planned", "does not fit" or "refused"."""
    request = random_request(seed)
    try:
        result = search(request)
    except PlacementError as error:
        assert request.strategy is not None, "only a strategy that was asked for may be refused"
        assert "\n" not in str(error) and len(str(error)) > 20
        return "refused"
    plan = json.loads(json.dumps(plan_document(result)))
    problems = verify_plan(plan)
    assert not problems, problems[:3]
    assert all(len(r["reason"]) > 10 for r in plan["rejected"])
    if result.best is None:
        return "does not fit"
    assert result.best.tokens_per_s <= result.tokens_per_s_bound * (1 + 1e-9)
    return "planned"


@pytest.mark.parametrize("block", range(10))
def test_random_instances(block):
    outcomes = [check(seed) for seed in range(20 * block, 20 * block + 20)]
    assert outcomes.count("planned") >= 1


def test_strategies_of_one_device():
    shape = random_shape(np.random.default_rng(0))
    mesh = Mesh("one", (DEVICES["h100"],), Link("nvlink", 1e-5, 1e11, "test"))
    assert enumerate_strategies(shape, mesh) == [Strategy()]


def main(num_instances: int, first: int) -> None:
    started, outcomes = time.perf_counter(), dict[str, int]()
    for seed in range(first, first + num_instances):
        try:
            outcome = check(seed)
        except Exception as error:
            print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
            outcome = "FAILED"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if sum(outcomes.values()) % 500 == 0:
            print(f"{sum(outcomes.values())}: {outcomes}", flush=True)
    print(f"{num_instances} instances in {time.perf_counter() - started:.0f} s: {outcomes}")
    sys.exit("FAILED" in outcomes)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
