"""Measured kernel times take the place of fitted efficiencies, and a plan says so and still holds."""

from __future__ import annotations

import json

import pytest

from moec.compiler.plan.api import plan
from moec.compiler.plan.inputs import PlanError, read_times
from moec.passes.hardware.catalogue import DEVICES
from moec.passes.hardware.errors import PlacementError
from moec.passes.placement.calibration import fitted_parameters
from moec.passes.placement.measured import TimesTable, with_measured
from moec.passes.placement.weight_format import weight_format
from moec.passes.placement.zoo import zoo_shape

SHAPE = zoo_shape("mixtral-8x7b")
EXPERTS, LINEAR = [8, 14336, 4096, 2], [4096, 4096]


def model_us(device: str, tokens: int) -> float:
    """What the fitted model gives a 4096 x 4096 bf16 product."""
    params, d = fitted_parameters(), DEVICES[device]
    num = 4096 * 4096
    return 1e6 * max(2 * num / params.bytes_per_s(d), 2 * num * tokens / params.flops(d, "bf16"))


def table(factor: float, *tokens: int) -> TimesTable:
    rows = [{"op": "linear", "shape": LINEAR, "tokens": t, "us": factor * model_us("h100", t)} for t in tokens]
    return TimesTable({"times": rows}, "test")


def test_factor_is_the_mean_over_what_was_measured():
    devices = {"h100": DEVICES["h100"], "a100": DEVICES["a100"]}
    bf16 = weight_format("bf16")
    params, found = with_measured(fitted_parameters(), SHAPE, bf16, devices, {"h100": table(1.5, 1, 64, 4096)})
    # q and o projections have these sizes: three times each; a100 and the other parts keep the fitted efficiency
    assert found["h100"]["attention"].factor == pytest.approx(1.5)
    assert found["h100"]["attention"].points == 6
    assert list(found) == ["h100"] and list(params.measured["h100"]) == ["attention"]


def test_times_at_other_sizes_or_devices_change_nothing():
    devices = {"h100": DEVICES["h100"]}
    other = TimesTable({"times": [{"op": "linear", "shape": [1, 2], "tokens": 1, "us": 3.0}]}, "test")
    for times in ({"h100": other}, {"h200": table(1.5, 1)}, {}):
        params, found = with_measured(fitted_parameters(), SHAPE, weight_format("bf16"), devices, times)
        assert params == fitted_parameters() and not found


def test_a_plan_with_slower_experts_is_slower_says_so_and_holds():
    slow = TimesTable({"times": [{"op": "experts", "shape": EXPERTS, "tokens": 4096, "us": 1e6}]}, "test")
    plain = plan("zoo:mixtral-8x7b", "h100x2", "bf16", strategy="TP2").document
    made = plan("zoo:mixtral-8x7b", "h100x2", "bf16", strategy="TP2", times={"h100": slow})
    assert made.verify() == []
    assert made.document["measured"]["h100"]["experts"]["factor"] > 10
    assert made.document["tokens_per_s"] < plain["tokens_per_s"] / 10
    assert made.document["step_ms"]["attention"] <= plain["step_ms"]["attention"] * (1 + 1e-9)
    assert plain["measured"] == {}


@pytest.mark.parametrize(
    "data",
    [[], {}, {"times": [{"op": "linear"}]}, {"times": [{"op": "linear", "shape": [1, 1], "tokens": 1, "us": -2.0}]}],
)
def test_bad_tables(data):
    with pytest.raises(PlacementError, match=r"^where: "):
        TimesTable(data, "where")


def test_times_file(tmp_path):
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"h100": {"times": [{"op": "linear", "shape": LINEAR, "tokens": 1, "us": 30.0}]}}))
    assert read_times(file)["h100"].measured("linear", tuple(LINEAR), 1) == 30.0
    file.write_text("[1]")
    with pytest.raises(PlanError, match="a table of times per device"):
        read_times(file)
