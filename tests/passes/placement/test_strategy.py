"""Strategy names and the enumerated space."""

from __future__ import annotations

import pytest

from moec.passes.hardware.catalogue import named_mesh
from moec.passes.hardware.errors import PlacementError
from moec.passes.placement.strategy import Strategy, enumerate_strategies, parse_strategy
from moec.passes.placement.zoo import ZOO, zoo_shape


@pytest.mark.parametrize("mesh", ["rtx4090x8", "h100x8x2", "h100x6"])
def test_names_are_unique_and_read_back(mesh):
    for shape in ZOO:
        found = enumerate_strategies(shape, named_mesh(mesh))
        assert len({s.name for s in found}) == len(found)
        assert all(parse_strategy(s.name) == s for s in found)
        assert all(s.num_ranks == named_mesh(mesh).num_devices for s in found)


@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("TP8", Strategy(attention_tp=8, expert_tp=8)),
        ("TP4xPP2", Strategy(stages=2, attention_tp=4, expert_tp=4)),
        ("PP8", Strategy(stages=8)),
        ("EP8", Strategy(attention_tp=8, expert_groups=8)),
        ("EP4TP2", Strategy(attention_tp=8, expert_groups=4, expert_tp=2)),
        ("DP8-EP8+1", Strategy(attention_tp=1, expert_groups=8, spare_slots=1)),
        ("DP2TP4-EP8", Strategy(attention_tp=4, expert_groups=8)),
        ("TP2xR4", Strategy(replicas=4, attention_tp=2, expert_tp=2)),
        ("TP8-fixed", Strategy(attention_tp=8, expert_tp=8, rotate=False)),
    ],
)
def test_parse(text, strategy):
    assert parse_strategy(text) == strategy


@pytest.mark.parametrize("text", ["", "TP", "TP0", "TP-8", "EP8xTP8x", "fast", "DP3TP3-EP8", "tp8"])
def test_bad_names(text):
    with pytest.raises(PlacementError, match="strategy '"):
        parse_strategy(text)


def test_experts_fewer_than_devices_are_shared():
    names = {s.name for s in enumerate_strategies(zoo_shape("apus-xdan-4.0"), named_mesh("rtx4090x8"))}
    assert "EP4TP2" in names
    assert "EP8" not in names
