"""What runs beside a collective, what must not be cut in chunks, and ranks that would wait for each other."""

from __future__ import annotations

import pytest
import torch
from placed import placed, prepared_family, uneven_model

from moec.passes.infra.base import PassContext
from moec.passes.infra.errors import PassError
from moec.passes.infra.rewrite import call, calls, is_call
from moec.passes.ir.copies import copy_of
from moec.passes.placing.collectives import ISSUED, WAIT, c10d, check_order, collectives
from moec.passes.placing.lockstep import run_ranks
from moec.passes.placing.overlap_collectives import OverlapCollectives

moec, aten = torch.ops.moec, torch.ops.aten


def order(graph) -> list[str]:
    """The calls that matter of layer 0, in order."""
    short = {moec.experts.default: "experts", moec.gated_mlp.default: "shared", WAIT: "wait"}
    names = short | {c10d.all_to_all_single.default: "exchange"}
    return [names[n.target] for n in graph.graph.nodes if n.meta.get("layer") == 0 and n.target in names]


@pytest.mark.parametrize("family", ["qwen2_moe", "xverse"])
def test_shared_experts_run_while_tokens_travel(family):
    gm, _, config = prepared_family(family)
    found = order(placed(gm, config, "DP2-EP2").graphs[0])
    assert found.count("shared") == 1
    # numbers of rows, rows and routes are under way when the shared experts run; then they are waited for
    before = found[: found.index("shared")]
    assert before.count("exchange") == 3 and before.count("wait") == 1
    assert found.index("shared") < found.index("experts")


def test_a_chunk_travels_while_another_is_computed():
    captured, config = uneven_model()
    result = placed(captured.graph_module, config, "DP4-EP4", chunks=3)
    found = order(result.graphs[0])
    assert found.count("experts") == 3 and found.count("exchange") == 12
    assert found[: found.index("experts")].count("exchange") == 9  # all chunks are sent before the first is computed
    check_order(result.graphs)


def test_what_looks_at_several_rows_is_not_cut():
    """A scale over the whole batch, as dynamic quantisation puts it, would be another one in every chunk."""
    captured, config = uneven_model()
    graph = placed(captured.graph_module, config, "DP4-EP4").graphs[0]
    experts = next(iter(calls(graph, moec.experts.default)))
    rows = experts.args[0]
    with graph.graph.inserting_before(experts):
        greatest = call(graph.graph, aten.amax.default, (rows, [0, 1]), like=rows)
        scaled = call(graph.graph, aten.div.Tensor, (rows, greatest), like=rows)
    experts.replace_input_with(rows, scaled)
    ledger = OverlapCollectives().run(graph, PassContext(options={"overlap-collectives": 2})).ledger
    refused = [r.reason for r in ledger.refused if "chunks" in r.reason]
    assert len(refused) == 1 and "amax" in refused[0] and "may look at several rows at once" in refused[0]
    assert sum("2 chunks" in m.detail for m in ledger.matched) == 2  # the other layers are cut


def test_waits_sink_to_their_first_reader():
    gm, _, config = prepared_family("qwen2_moe")
    for graph in placed(gm, config, "TP2").graphs:
        for wait in calls(graph, WAIT):
            after = wait.next
            assert after in wait.users or after.op == "output" or is_call(after, *ISSUED)


def test_order_that_differs_is_found_before_anything_runs():
    captured, config = uneven_model()
    graphs = list(placed(captured.graph_module, config, "TP2").graphs)
    other = copy_of(graphs[1])
    first = next(iter(calls(other, c10d.all_reduce.default)))
    wait = next(u for u in first.users)
    wait.replace_all_uses_with(first.args[0])
    other.graph.erase_node(wait)
    other.graph.erase_node(first)
    with pytest.raises(PassError, match=r"ranks 0 and 1 disagree on the order of collectives of stage-0"):
        check_order([graphs[0], other])
    inputs = [torch.tensor([1]), torch.tensor([0]), torch.tensor([0])]
    given = [[*inputs, *(torch.zeros(1, 4, *map(int, c.meta["val"].shape[2:])) for c in _caches(g))] for g in graphs]
    with pytest.raises(
        PassError, match=r"wait for each other for ever: rank 0 at all_gather.*rank 1 has ended|together"
    ):
        run_ranks([graphs[0], other], given, captured.read)


def _caches(graph):
    return list(graph.graph.find_nodes(op="placeholder"))[3:]


def test_collectives_say_what_is_exchanged():
    captured, config = uneven_model()
    graphs = placed(captured.graph_module, config, "DP2TP2-EP4").graphs
    found = collectives(graphs[3])
    exchanged = [c for c in found if c.op == "all_to_all_single" and c.layer == 0]
    assert [c.shape for c in exchanged] == [("4",), ("S0", "48"), ("S0", "4"), ("S1", "48")]
    assert {c.group for c in exchanged} == {"stage-0"} and {c.group for c in found} == {"stage-0", "lane-2"}
