"""Capacities in placed graphs: what is dropped, that all ranks drop the same, and what stays as it is."""

from __future__ import annotations

import json

import pytest
import torch
from placed import document, uneven_model

from moec.passes.hardware.errors import PlacementError
from moec.passes.infra.base import PassContext
from moec.passes.infra.errors import PassError
from moec.passes.infra.rewrite import calls
from moec.passes.ir.copies import copy_of
from moec.passes.ir.text import graph_text
from moec.passes.placement.rank_shares import rank_shares
from moec.passes.placing.check_ranks import check_ranks
from moec.passes.placing.choose_strategy import ChooseStrategy
from moec.passes.placing.limit_experts import Capacity, LimitExperts, limited
from moec.passes.placing.place import place

TOLERANCE = 1e-5  # f32 sums in another order, as in test_place.py
WORDS = 100
limit_slots = torch.ops.moec.limit_slots.default


def shares_of(strategy: str):
    captured, config = uneven_model()
    made = json.loads(json.dumps(document(config, strategy)))
    size = made["certificate"]["plan"]
    count = size["stages"] * size["expert_groups"] * size["expert_tp"]
    return captured, [rank_shares(made, r) for r in range(count)]


@pytest.mark.parametrize(
    ("strategy", "capacity", "chunks"),
    [
        ("TP2", Capacity(0.6, "expert"), 1),
        ("EP4", Capacity(0.6), 1),
        ("DP2-EP2+1", Capacity(0.7), 2),
        ("DP2TP2-EP4xPP3", Capacity(0.7, "expert"), 1),
    ],
)
def test_ranks_together_drop_what_one_graph_drops(strategy, capacity, chunks):
    captured, shares = shares_of(strategy)
    result = place(captured.graph_module, shares, chunks, capacity)
    whole = limited(captured.graph_module, shares, capacity)
    assert sum(1 for _ in calls(whole, limit_slots)) == 3
    check_ranks(whole, result, captured.read, WORDS, TOLERANCE)
    with pytest.raises(PassError, match="differs"):  # it does drop: without a capacity the answer is another
        check_ranks(captured.graph_module, result, captured.read, WORDS, TOLERANCE)


def test_copies_are_counted_and_keep_every_slot():
    captured, shares = shares_of("EP2+1")
    result = place(captured.graph_module, shares)
    found = [list(calls(g, limit_slots)) for g in result.graphs]
    assert [len(f) for f in found] == [3, 3]
    assert {n.args[5] for f in found for n in f} == {0.0} and [n.args[6] for n in found[0]] == [0, 1, 2]
    names = [str(n.target) for n in result.graphs[0].graph.find_nodes(op="get_attr")]
    assert {n for n in names if n.startswith("token_shares")} >= {"token_shares_0", "token_shares_1", "token_shares_2"}
    check_ranks(captured.graph_module, result, captured.read, WORDS, TOLERANCE)


def test_without_a_capacity_and_copies_nothing_changes():
    captured, shares = shares_of("EP4")
    gm = copy_of(captured.graph_module)
    ChooseStrategy().run(gm, PassContext(options={"choose-strategy": shares[0]}))
    before = graph_text(gm)
    assert not LimitExperts().run(gm, PassContext()).changed and graph_text(gm) == before
    assert limited(gm, shares, None) is gm


def test_experts_that_the_plan_does_not_place_are_refused():
    captured, shares = shares_of("TP2")
    gm = copy_of(captured.graph_module)
    ChooseStrategy().run(gm, PassContext(options={"choose-strategy": shares[0]}))
    experts = next(iter(calls(gm, torch.ops.moec.experts.default)))
    experts.meta["share"] = type(experts.meta["share"])(**vars(experts.meta["share"]) | {"residency": None})
    ledger = LimitExperts().run(gm, PassContext(options={"limit-experts": Capacity(1.0)})).ledger
    assert [r.reason for r in ledger.refused] == ["the plan has no experts here"] and len(ledger.matched) == 2


@pytest.mark.parametrize(
    ("factor", "per"), [(0.0, "device"), (-1.0, "expert"), (1.0, "layer"), (float("nan"), "device")]
)
def test_capacities_without_a_meaning(factor, per):
    with pytest.raises(PlacementError, match="capacity"):
        Capacity(factor, per)
