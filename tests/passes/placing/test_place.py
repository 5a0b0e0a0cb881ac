"""Plans applied to graphs: all ranks in lockstep give what the one graph gave; what cannot be cut is refused by
name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from passing import copy_of, family_case
from torch.fx import GraphModule
from transformers import MixtralConfig, MixtralForCausalLM
from zoo import tiny

from moec.compiler.capture import capture
from moec.compiler.plan.api import plan
from moec.compiler.plan.config import shape_from_config
from moec.passes.hardware.errors import PlacementError
from moec.passes.infra.base import PassContext
from moec.passes.infra.errors import PassError
from moec.passes.infra.rewrite import calls
from moec.passes.infra.runner import run_passes
from moec.passes.ir.text import graph_text
from moec.passes.pipeline import PIPELINE
from moec.passes.placement.rank_shares import rank_shares
from moec.passes.placing.insert_collectives import collective_order
from moec.passes.placing.place import PLACE, Placed, check_ranks, place

BEFORE_PLACE = [p.name for p in PIPELINE].index("fuse-gate-up") + 1
TOLERANCE = 1e-5  # f32 sums in another order: measured 3e-7 to 7e-7


def inputs(gm: GraphModule) -> tuple[Any, ...]:
    """Two sequences in empty caches of the graph's own sizes."""
    ids = torch.randint(1, 100, (8,), generator=torch.Generator().manual_seed(3))
    positions, slots = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1]), torch.tensor([0] * 6 + [2] * 2)
    caches = list(gm.graph.find_nodes(op="placeholder"))[3:]
    sizes = [[int(n) for n in c.meta["val"].shape[2:]] for c in caches]
    return ids, positions, slots, *(torch.zeros(3, 32, *s) for s in sizes)


def placed(gm: GraphModule, read: Any, config: dict, strategy: str) -> Placed:
    """Runs the pipeline up to placement, plans, and places."""
    run_passes(gm, PIPELINE[:BEFORE_PLACE], PassContext(read=read), evidence="off")
    ranks = int(strategy[2])
    made = plan(shape_from_config(config, "tiny"), f"h100x{ranks}", "bf16", prompt_len=8, gen_len=8, strategy=strategy)
    document = json.loads(json.dumps(made.document))
    return place(gm, [rank_shares(document, r) for r in range(ranks)], copy_of)


@pytest.mark.parametrize("strategy", ["TP2", "EP2"])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "dots1"])
def test_ranks_together_compute_the_same(family, strategy):
    """Shared experts with a gate, biases and sinks, a dense first layer and shared experts: every site is cut."""
    case = family_case(family)
    result = placed(case.gm, case.read, tiny(family).to_dict(), strategy)
    for ledgers in result.ledgers:
        assert not ledgers["choose-strategy"].refused
        assert not ledgers["shard-weights"].refused
        assert ledgers["shard-weights"].matched
    assert check_ranks(case.gm, result, inputs, case.read, TOLERANCE) <= TOLERANCE


@pytest.fixture(scope="module")
def uneven():
    """6 heads, 5 experts of width 48 and 3 layers: nothing divides by 4."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=48, intermediate_size=48, num_hidden_layers=3, num_attention_heads=6, vocab_size=131
    )
    config.num_key_value_heads, config.num_local_experts = 6, 5
    return capture(MixtralForCausalLM(config).eval()), config.to_dict()


@pytest.mark.parametrize("strategy", ["TP4", "EP4"])
def test_uneven_shares_that_rotate(uneven, strategy):
    captured, config = uneven
    gm = copy_of(captured.graph_module)
    result = placed(gm, captured.read, config, strategy)
    assert check_ranks(gm, result, inputs, captured.read, TOLERANCE) <= TOLERANCE
    heads = [int(n.meta["val"].shape[1]) for n in calls(result.graphs[0], torch.ops.moec.cached_attention.default)]
    assert heads == [2, 1, 2]  # 6 heads over 4 ranks move from layer to layer
    assert len({collective_order(g) for g in result.graphs}) == 1


def test_text_of_one_rank(uneven):
    captured, config = uneven
    gm = copy_of(captured.graph_module)
    text = graph_text(placed(gm, captured.read, config, "EP4").graphs[1])
    assert "_c10d_functional.all_reduce" in text
    assert "slice(model.layers.0.self_attn.q_proj.weight" in text


def test_a_wrong_shard_is_noticed(uneven):
    """Evidence fails when one rank's experts are scaled: it compares numbers, not intentions."""
    captured, config = uneven
    gm = copy_of(captured.graph_module)
    result = placed(gm, captured.read, config, "TP4")
    rank = result.graphs[2]
    node = next(iter(calls(rank, torch.ops.moec.experts.default)))
    attr = str(node.args[4].target)
    weight = rank.meta["weights"][attr]
    rank.meta["weights"][attr] = type(weight)("scale", (1.5,), (weight,), weight.shape, weight.dtype)
    with pytest.raises(PassError, match="rank 0 of 4 differs"):
        check_ranks(gm, result, inputs, captured.read, TOLERANCE)


def test_norm_over_all_heads_is_refused():
    case = family_case("olmoe")
    result = placed(case.gm, case.read, tiny("olmoe").to_dict(), "TP2")
    refused = result.ledgers[0]["shard-weights"].refused
    assert len(refused) == len(list(calls(case.gm, torch.ops.moec.cached_attention.default)))
    assert all("works on all heads at once" in r.reason for r in refused)
    assert check_ranks(case.gm, result, inputs, case.read, TOLERANCE) <= TOLERANCE  # attention stays whole


def test_plan_of_another_model_is_refused(uneven):
    captured, config = uneven
    other = config | {"num_attention_heads": 8, "num_key_value_heads": 8, "num_local_experts": 7}
    result = placed(copy_of(captured.graph_module), captured.read, other, "TP2")
    reasons = [r.reason for r in result.ledgers[0]["choose-strategy"].refused]
    assert any("6 query and 6 key/value heads, the plan has 8 and 8" in r for r in reasons)
    assert any("5 experts of width 48, the plan has 7" in r for r in reasons)


def test_without_a_plan_nothing_changes(uneven):
    captured, _ = uneven
    gm = copy_of(captured.graph_module)
    before = graph_text(gm)
    assert not any(step.run(gm, PassContext()).changed for step in PLACE)
    assert graph_text(gm) == before


@pytest.mark.parametrize(("strategy", "mesh"), [("TP2xPP2", "h100x4"), ("DP2-EP2", "h100x2"), ("EP2+1", "h100x2")])
def test_plans_that_the_passes_do_not_apply(strategy, mesh):
    document = plan("zoo:mixtral-8x7b", mesh, "fp8", strategy=strategy).document
    with pytest.raises(PlacementError, match=r"one stage, one attention lane and no copied experts; plan again with"):
        rank_shares(document, 0)


def test_no_such_rank():
    document = plan("zoo:deepseek-moe-16b", "h100x2", "fp8", strategy="TP2").document
    with pytest.raises(PlacementError, match="no rank 2; a replica has ranks 0 to 1"):
        rank_shares(document, 2)
