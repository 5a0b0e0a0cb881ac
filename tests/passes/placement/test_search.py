"""Plans of the zoo: what is reproduced, what is proven, what is refused; and that the verifier notices what is
changed."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest

from moec.passes.hardware.catalogue import mesh_from_dict, named_mesh
from moec.passes.hardware.errors import PlacementError
from moec.passes.placement.calibration import fitted_parameters
from moec.passes.placement.plan_document import plan_document
from moec.passes.placement.routing import zipf_trace
from moec.passes.placement.search import PlanRequest, search
from moec.passes.placement.serving import Workload
from moec.passes.placement.strategy import parse_strategy
from moec.passes.placement.verify import verify_plan
from moec.passes.placement.weight_format import weight_format
from moec.passes.placement.zoo import zoo_shape


def request(
    model="skywork-moe", mesh="rtx4090x8", weights="fp8", strategy=None, lengths=(128, 128), **more
) -> PlanRequest:
    shape = zoo_shape(model)
    asked = parse_strategy(strategy) if strategy else None
    where = named_mesh(mesh) if isinstance(mesh, str) else mesh
    trace = zipf_trace(shape, 0.4)
    fitted = fitted_parameters()
    return PlanRequest(shape, where, weight_format(weights), Workload(*lengths), trace, fitted, strategy=asked, **more)


def document(asked: PlanRequest) -> dict:
    """The plan as it is read from a file."""
    return json.loads(json.dumps(plan_document(search(asked))))


def test_skywork_plan_of_its_serving_fork():
    """5,5,5,5,4,4,4,4 heads in every layer; 17.17 and 17.06 GiB of weights (SkyworkAI/vllm, vocabulary padding
    aside)."""
    plan = document(request(strategy="TP8-fixed"))
    assert verify_plan(plan) == []
    for layer in plan["layers"]:
        assert layer["attention"] == [5, 5, 5, 5, 4, 4, 4, 4]
    assert [round(r["weight_bytes"] / 2**30, 2) for r in plan["ranks"]] == [17.17] * 4 + [17.06] * 4


def test_rotated_heads_hold_12_percent_more_tokens():
    fork, ours = document(request(strategy="TP8-fixed")), document(request(strategy="TP8"))
    assert verify_plan(ours) == []
    assert sum(r["weight_bytes"] for r in ours["ranks"]) == sum(r["weight_bytes"] for r in fork["ranks"])
    assert ours["kv_tokens"] >= 1.12 * fork["kv_tokens"]


@pytest.mark.parametrize(
    ("model", "mesh", "weights"),
    [
        ("skywork-moe", "rtx4090x8", "fp8"),
        ("deepseek-moe-16b", "rtx4090x8", "bf16"),
        ("apus-xdan-4.0", "h100x8", "int8"),
        ("grok-1", "h200x8", "bf16"),
        ("mixtral-8x7b", "h100x8x2", "fp8"),
    ],
)
def test_plan_is_verified_and_within_one_percent(model, mesh, weights):
    plan = document(request(model, mesh, weights))
    assert verify_plan(plan) == []
    assert 0 <= plan["certificate"]["gap"] <= 0.01
    assert all(r["reason"] for r in plan["rejected"])


def test_what_cannot_fit_is_proven():
    plan = document(request("grok-1", "rtx4090x8", "fp8"))
    assert not plan["feasible"]
    assert verify_plan(plan) == []
    assert all("fit" in r["reason"] or "copy" in r["reason"] or "shares" in r["reason"] for r in plan["rejected"])
    roomier = copy.deepcopy(plan)
    for device in roomier["mesh"]["devices"]:
        device["memory_bytes"] *= 4
    assert verify_plan(roomier)  # the same claim with more memory is false


def uneven_mesh():
    devices = ["h100", "h100", "a100", "l40s"]
    link = {"kind": "pcie", "latency_s": 3e-5, "bytes_per_s": 2e10}
    return mesh_from_dict({"name": "mixed", "devices": devices, "inside": link}, "mixed")


def test_unequal_devices():
    plan = document(request("mixtral-8x7b", uneven_mesh(), "fp8"))
    assert verify_plan(plan) == []
    tensor = document(request("mixtral-8x7b", uneven_mesh(), "fp8", "TP4"))
    assert verify_plan(tensor) == []
    blocks = tensor["layers"][0]["experts"]
    assert blocks[0] > blocks[3]  # the faster device holds more


def change_attention(plan):
    plan["layers"][3]["attention"][0] += 1


def change_residency(plan):
    plan["layers"][3]["resident"].pop()


def change_share(plan):
    plan["layers"][3]["resident"][0][2] = 0.5


def change_tokens(plan):
    plan["kv_tokens"] = int(plan["kv_tokens"] * 1.1)


def change_weights(plan):
    plan["ranks"][2]["weight_bytes"] *= 0.99


def change_speed(plan):
    plan["tokens_per_s"] *= 1.05
    plan["certificate"]["objective"] /= 1.05


def change_bound(plan):
    plan["certificate"]["lower_bound"] *= 1.01


def change_strategy_bound(plan):
    plan["certificate"]["strategies"][0]["lower_bound"] *= 1.01


def change_cache_bound(plan):
    plan["certificate"]["strategies"][0]["kv_tokens"] *= 0.9


def change_vocabulary(plan):
    plan["head"][0] -= 1


def change_cuts(plan):
    plan["cuts"][-1] -= 1


def change_unit_bytes(plan):
    for entry in [*plan["certificate"]["strategies"], plan["certificate"]["plan"]]:
        for cls in entry["classes"]:
            cls["terms"]["experts"]["bytes"] *= 0.5


def change_units(plan):
    for entry in plan["certificate"]["strategies"]:
        for cls in entry["classes"]:
            cls["terms"]["attention"]["units"] -= 1


@pytest.fixture(scope="module")
def good_plan():
    return document(request(strategy="EP8"))


@pytest.mark.parametrize("change", [v for k, v in list(globals().items()) if k.startswith("change_")])
def test_verifier_notices(good_plan, change):
    plan = copy.deepcopy(good_plan)
    assert verify_plan(plan) == []
    change(plan)
    assert verify_plan(plan)


def test_batch_and_queue():
    fixed = search(request("mixtral-8x7b", "h100x8", "fp8", batch=64)).best
    full = search(request("mixtral-8x7b", "h100x8", "fp8")).best
    assert fixed.tokens_per_s < full.tokens_per_s
    asked = request("mixtral-8x7b", "h100x8", "fp8", "TP8")
    queue = search(replace(asked, workload=Workload(128, 128, 3000))).best
    steady = search(asked).best
    assert queue.tokens_per_s < steady.tokens_per_s  # filling and draining cost time
    assert verify_plan(document(replace(asked, batch=64))) == []
    assert verify_plan(document(replace(asked, workload=Workload(128, 128, 3000)))) == []


def test_more_sequences_never_lower_throughput():
    """The monotony that lets the search take the largest batch that fits."""
    rates = [
        search(request("deepseek-moe-16b", "l40sx8", "int4", "DP8-EP8", batch=b)).best.tokens_per_s
        for b in (8, 9, 64, 500, 2000)
    ]
    assert np.all(np.diff(rates) > 0)


@pytest.mark.parametrize(
    ("strategy", "mesh", "message"),
    [
        ("TP8", "rtx4090x4", "needs 8 devices, mesh rtx4090x4 has 4"),
        ("TP64", "rtx4090x8x8", "skywork-moe: attention has 36 query heads, fewer than the 64 shares asked for"),
    ],
)
def test_strategy_that_cannot_be(strategy, mesh, message):
    with pytest.raises(PlacementError) as error:
        search(request(mesh=mesh, strategy=strategy))
    assert message in str(error.value)


def test_replicas_on_unequal_slices_are_refused():
    with pytest.raises(PlacementError, match="different devices"):
        search(request("mixtral-8x7b", uneven_mesh(), "fp8", "TP2xR2"))


MIXED = {
    "name": "4x4090 and 4xL40S",
    "devices": ["rtx4090"] * 4 + ["l40s"] * 4,
    "inside": {"kind": "pcie", "latency_s": 4.2e-5, "bytes_per_s": 3.15e10},
}


@pytest.mark.parametrize(
    ("model", "weights", "gap"),
    [("deepseek-moe-16b", "fp8", 0.01), ("mixtral-8x22b", "fp8", 0.01)],
)
def test_little_is_left_unproven_on_unequal_devices(model, weights, gap):
    """Memory and speed pull apart on a mesh of two kinds; the bound takes both, so that little is left unproven."""
    asked = request(model, mesh_from_dict(MIXED, "test"), weights)
    plan = document(asked)
    assert verify_plan(plan) == []
    assert plan["certificate"]["gap"] <= gap


def test_steps_of_a_bound_must_leave_no_hole():
    """Without one of its entries a strategy's bound says nothing about the layouts between the entries beside it."""
    asked = request("deepseek-moe-16b", mesh_from_dict(MIXED, "test"), strategy="TP1xPP8")
    plan = document(asked)
    entries = plan["certificate"]["strategies"]
    assert verify_plan(plan) == [] and len(entries) > 2
    plan["certificate"]["strategies"] = entries[:-1]
    assert any("more than the stated" in line for line in verify_plan(plan))
    plan["certificate"]["strategies"] = entries[-1:]
    assert any("is not proven" in line for line in verify_plan(plan))
