"""Plans applied to graphs: all ranks in lockstep give what the one graph gave; what cannot be cut is refused by
name."""

from __future__ import annotations

import pytest
import torch
from placed import document, placed, prepared_family, uneven_model

from moec.passes.hardware.errors import PlacementError
from moec.passes.infra.base import PassContext
from moec.passes.infra.errors import PassError
from moec.passes.infra.rewrite import calls
from moec.passes.ir.copies import copy_of
from moec.passes.ir.text import graph_text
from moec.passes.placement.rank_shares import rank_shares
from moec.passes.placing.check_ranks import check_ranks
from moec.passes.placing.collectives import collectives
from moec.passes.placing.place import PLACE, Placed, finish, place

TOLERANCE = 1e-5  # f32 sums in another order: measured 1e-7 to 1e-6
WORDS = 100  # below every tiny model's vocabulary
EVERY = ("TP4", "EP4", "EP2TP2", "TP2xPP3", "DP4-EP4", "DP2TP2-EP4", "DP2-TP2", "DP4-EP2TP2", "EP2+1", "DP4-EP4+1xPP2")
LANES = tuple(s for s in EVERY if s.startswith("DP"))


def agree(result: Placed, gm, read) -> None:
    evidence = check_ranks(gm, result, read, WORDS, TOLERANCE)
    assert {e.probe for e in evidence} >= {"random tokens", "one token everywhere", "one token in the last lane"}
    assert (max(p.lane for p in result.places) > 0) == any("no tokens" in e.probe for e in evidence)


@pytest.mark.parametrize("strategy", EVERY)
def test_every_strategy_computes_the_same(strategy):
    captured, config = uneven_model()
    result = placed(captured.graph_module, config, strategy)
    for ledgers in result.ledgers:
        assert not ledgers["choose-strategy"].refused
        assert not ledgers["shard-weights"].refused
    agree(result, captured.graph_module, captured.read)


@pytest.mark.parametrize("strategy", LANES)
def test_chunks_compute_the_same(strategy):
    """The rows of each chunk are other rows, not other sums: chunks change no result but by the products' own
    rounding."""
    captured, config = uneven_model()
    result = placed(captured.graph_module, config, strategy, chunks=2)
    assert any("2 chunks" in m.detail for m in result.ledgers[0]["overlap-collectives"].matched)
    agree(result, captured.graph_module, captured.read)


@pytest.mark.parametrize("strategy", ["TP2", "DP2-EP2"])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "dots1", "deepseek_v3"])
def test_families(family, strategy):
    """Shared experts with a gate, biases and sinks, a dense first layer and shared experts, latent attention."""
    gm, read, config = prepared_family(family)
    result = placed(gm, config, strategy)
    for ledgers in result.ledgers:
        assert not ledgers["choose-strategy"].refused
        assert not ledgers["shard-weights"].refused
    agree(result, gm, read)


@pytest.mark.parametrize("family", ["grok-1", "granitemoe"])
def test_what_follows_the_head_sees_whole_logits(family):
    """A multiplier behind the output projection: its shape is that of all words again, not of a rank's."""
    gm, read, config = prepared_family(family)
    result = finish(placed(gm, config, "TP2"), (), [PassContext(read=read)] * 2)
    for graph in result.graphs:
        logits = graph.graph.output_node().args[0]
        logits = logits[0] if isinstance(logits, list | tuple) else logits
        assert int(logits.meta["val"].shape[-1]) == config["vocab_size"]
    agree(result, gm, read)


def test_shares_rotate():
    captured, config = uneven_model()
    result = placed(captured.graph_module, config, "TP4")
    heads = [int(n.meta["val"].shape[1]) for n in calls(result.graphs[0], torch.ops.moec.cached_attention.default)]
    assert heads == [2, 1, 2]  # 6 heads over 4 ranks move from layer to layer


def test_stages_hold_their_own_layers():
    captured, config = uneven_model()
    result = placed(captured.graph_module, config, "TP2xPP3")
    names = [[n.name for n in g.graph.find_nodes(op="placeholder")] for g in result.graphs]
    assert names[2] == ["tokens", "positions", "slots", "cache_1_a", "cache_1_b"]
    assert [len(n) for n in names] == [5] * 6
    assert {c.op for c in collectives(result.graphs[0])} == {"all_reduce", "isend"}


def test_text_of_one_rank():
    captured, config = uneven_model()
    text = graph_text(placed(captured.graph_module, config, "DP4-EP4").graphs[1])
    assert "_c10d_functional.all_to_all_single" in text
    assert "f32[S0, 4]" in text  # weights and experts of the rows sent
    assert "slice(model.layers.0.mlp.experts" in text


def test_a_wrong_shard_is_noticed():
    """Evidence fails when one rank's experts are scaled: it compares numbers, not intentions."""
    captured, config = uneven_model()
    result = placed(captured.graph_module, config, "TP4")
    rank = result.graphs[2]
    node = next(iter(calls(rank, torch.ops.moec.experts.default)))
    attr = str(node.args[4].target)
    weight = rank.meta["weights"][attr]
    rank.meta["weights"][attr] = type(weight)("scale", (1.5,), (weight,), weight.shape, weight.dtype)
    with pytest.raises(PassError, match=r"rank 0 of 4 differs .* on the probe 'random tokens'"):
        agree(result, captured.graph_module, captured.read)


def test_norm_over_all_heads_is_refused():
    gm, read, config = prepared_family("olmoe")
    result = placed(gm, config, "TP2")
    refused = result.ledgers[0]["shard-weights"].refused
    assert len(refused) == len(list(calls(gm, torch.ops.moec.cached_attention.default)))
    assert all("works on all heads at once" in r.reason for r in refused)
    agree(result, gm, read)  # attention stays whole


def test_plan_of_another_model_is_refused():
    captured, config = uneven_model()
    other = config | {"num_attention_heads": 8, "num_key_value_heads": 8, "num_local_experts": 7}
    result = placed(captured.graph_module, other, "TP2")
    reasons = [r.reason for r in result.ledgers[0]["choose-strategy"].refused]
    assert any("6 query and 6 key/value heads, the plan has 8 and 8" in r for r in reasons)
    assert any("5 experts of width 48, the plan has 7" in r for r in reasons)


def test_without_a_plan_nothing_changes():
    gm = copy_of(uneven_model()[0].graph_module)
    before = graph_text(gm)
    assert not any(step.run(gm, PassContext()).changed for step in PLACE if step.name != "overlap-collectives")
    assert graph_text(gm) == before


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_rank_without_columns_takes_part_in_every_exchange(chunks):
    """Two lanes, two groups of two ranks; the first rank of a group holds no columns of its experts, in turn."""
    captured, config = uneven_model()
    made = document(config, "DP2TP2-EP2TP2")
    for number, layer in enumerate(made["layers"]):
        layer["experts"] = [0, 3, 2, 1] if number % 2 else [2, 1, 0, 3]
    shares = [rank_shares(made, r) for r in range(4)]
    assert shares[0].layers[1].residency.group_of_rank == (-1, 0, 1, 1)
    result = place(captured.graph_module, shares, chunks)
    counts = [len(collectives(g)) for g in result.graphs]
    assert len(set(counts)) == 1  # what nobody reads is still received: the others wait for it
    agree(result, captured.graph_module, captured.read)


def test_no_such_rank():
    made = document(uneven_model()[1], "TP2")
    with pytest.raises(PlacementError, match="no rank 2; a replica has ranks 0 to 1"):
        rank_shares(made, 2)


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [(12, 2, 4), (24, 2, 3), (16, 4, 3), (12, 2, 5)])
def test_query_heads_keep_their_key_heads(heads, kv_heads, ranks):
    """However query heads are dealt, each finds its own key/value head in the rank's cache, all equally often."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8}
    made = document(uneven_model()[1] | sizes, f"TP{ranks}")
    for share in (rank_shares(made, r).layers[0] for r in range(ranks)):
        per_head = share.query_heads.size // len(share.kv_heads)
        wanted = [q // (heads // kv_heads) for q in range(share.query_heads.start, share.query_heads.stop)]
        assert wanted == [k for k in share.kv_heads for _ in range(per_head)]
