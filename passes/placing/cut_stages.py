"""Keeps the layers of this rank's pipeline stage; values that cross a border are received, and sent on.

Before:  h0 = embedding(..) .. h1 = aten.add(..)  # layer 0 .. h2 = aten.add(..)  # layer 1 .. return logits
After:   (stage 1 of 2)  r = _c10d_functional.irecv(zeros [T, H], 0, 0, "pair-0-1"); h1 = wait_tensor(r) .. logits
         (stage 0 of 2)  .. s = _c10d_functional.isend(h1, 1, 0, "pair-0-1"); return (wait_tensor(s),)
Leaves alone: a plan of one stage; values that follow from the model's inputs alone (rotary angles), which every stage
         computes for itself.
Needs:   choose-strategy.
Gives:   caches of the stage's own layers only. A stage that is not the last returns the waits of what it sends.
Source:  GPipe (arXiv 1811.06965), with uneven cuts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.errors import PassError
from moec.passes.infra.rewrite import call, is_call, remove_dead, symbolic
from moec.passes.placement.rank_shares import RankPlace, RankShares
from moec.passes.placing.collectives import c10d, issue, pair_group, wait

aten = torch.ops.aten


class CutStages:
    """See the module."""

    name = "cut-stages"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        shares: RankShares | None = context.options.get("choose-strategy")
        if shares is None or shares.place.num_stages == 1:
            return PassResult(gm, False, Ledger())
        place = shares.place
        stages, entries = _stage_of(gm, place), list[Match | NoMatch]()
        inputs = [n for n in gm.graph.find_nodes(op="placeholder") if n.users]
        here, after = _crossing(stages, place.stage), _crossing(stages, place.stage + 1)
        arrived = {value: _receive(gm, value, place) for value in here}
        after = [arrived.get(value, value) for value in after]
        entries += [Match(w.name, layer_of(w), f"received by stage {place.stage}") for w in arrived.values()]
        if not place.is_last:
            _send(gm, after, place)
            entries += [Match(v.name, layer_of(v), f"sent to stage {place.stage + 1}") for v in after]
        for node in reversed([n for n, stage in stages.items() if stage != place.stage]):
            gm.graph.erase_node(node)
        remove_dead(gm)
        for node in inputs[3:]:  # tokens, positions and slots are inputs of every stage
            if not node.users:
                gm.graph.erase_node(node)
        return PassResult(gm, True, Ledger.of(entries))


def _stage_of(gm: GraphModule, place: RankPlace) -> dict[Node, int]:
    """The stage of every call that follows from the embedding; the others are free."""
    stages: dict[Node, int] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        before = [stages[p] for p in node.all_input_nodes if p in stages]
        if before or is_call(node, aten.embedding.default):
            stages[node] = max([_stage_of_layer(node, place), *before])
    if not stages:
        raise PassError("pass cut-stages: the graph has no embedding to begin a pipeline with")
    return stages


def _stage_of_layer(node: Node, place: RankPlace) -> int:
    layer = layer_of(node)
    return 0 if layer is None else sum(cut <= layer for cut in place.cuts[1:-1])


def _crossing(stages: dict[Node, int], border: int) -> list[Node]:
    """The values of stages before `border` that it or a later one reads, in order."""
    return [n for n, s in stages.items() if s < border and any(stages.get(u, border) >= border for u in n.users)]


def _receive(gm: GraphModule, value: Node, place: RankPlace) -> Node:
    """What takes the place of a value of an earlier stage."""
    group = pair_group(place.rank - len(place.stage_ranks), place.rank)
    with gm.graph.inserting_before(value):
        sizes = _sizes(gm, value)
        kinds = {"dtype": value.meta["val"].dtype}
        tokens = next(iter(gm.graph.find_nodes(op="placeholder")))
        buffer = call(gm.graph, aten.new_zeros.default, (tokens, sizes), kinds, like=value)
        arrived = wait(gm, issue(gm, c10d.irecv.default, (buffer, 0, 0), group, value), value)
    value.replace_all_uses_with(arrived, propagate_meta=False)
    return arrived


def _sizes(gm: GraphModule, value: Node) -> list[Any]:
    """A value's sizes, as numbers or as the number of tokens. Raises: PassError: it is no tensor of tokens."""
    val = value.meta["val"]
    tokens = next(iter(gm.graph.find_nodes(op="placeholder")))
    count = call(gm.graph, aten.sym_size.int, (tokens, 0), like=value)
    known = {symbolic(tokens.meta["val"].shape[0]): count}
    if not isinstance(val, Tensor) or any(not isinstance(n, int) and symbolic(n) not in known for n in val.shape):
        shown = list(val.shape) if isinstance(val, Tensor) else type(val).__name__
        raise PassError(f"pass cut-stages: {value.name} crosses a border and is {shown}; expected a tensor of T rows")
    return [n if isinstance(n, int) else known[symbolic(n)] for n in val.shape]


def _send(gm: GraphModule, values: list[Node], place: RankPlace) -> None:
    """Sends values to the next stage; the graph's output is that they are gone."""
    output, group = gm.graph.output_node(), pair_group(place.rank, place.rank + len(place.stage_ranks))
    with gm.graph.inserting_before(output):
        sent = [issue(gm, c10d.isend.default, (v, 1, 0), group, v) for v in values]
        output.args = (tuple(wait(gm, s, s) for s in sent),)
