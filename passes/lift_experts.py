"""Lifts experts that are spelled out in ATen to one moec::experts.

Before:                                        (one of many spellings)
    index: f32[2*T, 96, 32] = aten.index.Tensor(w_gate_up, [chosen])
    bmm: f32[2*T, 96, 1] = aten.bmm(index, rows)
    ..
    sum: f32[T, 32] = aten.sum.dim_IntList(weighed, [1])
After:
    sum: f32[T, 32] = moec.experts(x, weights, chosen, w_gate_up, w_down, None, None, None, "silu")

Spellings: weights gathered per slot and batched products; slots sorted and aten._grouped_mm; batched products of all
experts, with routing weights that are zero elsewhere (also on the input: Llama 4); loops over experts that were
unrolled, with masks; one-hot einsum. The region between a top-k and the value where all paths from it meet is cut by
dataflow, and a reading is accepted only when moec::experts agrees with it on probes (see lifting/expert_reading.py).

Leaves alone: a choice that is no top-k over experts; experts that are no gated feed-forward; weights that are computed.
Needs: meta["val"].  Gives: moec::experts with canonical weights; the gate in front of it is lift-gate's.
Source: transformers' batched_mm and grouped_mm, Llama 4; facts of each in docs/models.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.kinds import kind_of
from moec.passes.infra.rewrite import Region, call, remove_dead, replace
from moec.passes.infra.verify import constant_nodes
from moec.passes.ir.weights import Weight, weight_node, weights_of
from moec.passes.lifting.expert_reading import ReadExperts, layouts, read_experts, roles
from moec.passes.lifting.expert_regions import Choice, ExpertsRegion, choices, regions

aten, moec = torch.ops.aten, torch.ops.moec


@dataclasses.dataclass(frozen=True)
class LiftExperts:
    """See the module."""

    name: str = "lift-experts"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        constants = constant_nodes(gm)
        known: dict[str, ReadExperts | str] = {}
        entries: list[Match | NoMatch] = []
        gone: set[Node] = set()
        for choice in list(choices(gm)):
            if choice.topk in gone:
                continue
            found = check(gm, choice, constants, known)
            if isinstance(found, NoMatch):
                entries += [found] if found.reason else []
                continue
            site, reading = found
            gone.update(site.cut.nodes)
            y = site.cut.output.name
            rewrite(gm, site, reading)
            detail = f"{choice.num_experts} experts, {reading.act}" + ", weight on input" * reading.weight_on_input
            entries.append(Match(y, layer_of(choice.topk), detail))
        ledger = Ledger.of(entries)
        if ledger.matched:
            remove_dead(gm)
        return PassResult(gm, bool(ledger.matched), ledger)


def check(
    gm: GraphModule, choice: Choice, constants: Collection[Node], known: dict[str, ReadExperts | str]
) -> tuple[ExpertsRegion, ReadExperts] | NoMatch:
    """The first region behind a choice that reads as experts. known: readings by kind of region, filled here."""
    reason = ""
    for site in regions(choice, constants):
        if isinstance(site, str):
            return NoMatch(reason or site, choice.topk.name, layer_of(choice.topk))
        kind = kind_of(
            Region((site.cut.entry, *site.cut.leaves), (*site.cut.weights, *site.cut.nodes), (choice.indices,))
        )
        if kind not in known:
            known[kind] = read_experts(site, weights_of(gm))
        reading = known[kind]
        if not isinstance(reading, str):
            return site, reading
        reason = reason or reading
    return NoMatch(reason, choice.topk.name, layer_of(choice.topk))


def rewrite(gm: GraphModule, site: ExpertsRegion, reading: ReadExperts) -> None:
    """Puts one moec::experts in the place of the region's output."""
    graph, weights, y = gm.graph, weights_of(gm), site.cut.output
    by_role = roles(site, weights)
    assert not isinstance(by_role, str)
    stacks = list(layouts(site, by_role))[reading.layout]
    stem = site.cut.weights[-1].name
    with graph.inserting_before(y):
        x, chosen = _rows(gm, site.cut.entry, y), site.choice.indices
        if chosen.meta["val"].dim() < site.choice.topk.args[0].meta["val"].dim():  # type: ignore[union-attr]
            chosen = call(graph, aten.unsqueeze.default, (chosen, -1), like=y)
        chosen = _rows(gm, chosen, y)
        factor = _rows(gm, site.cut.nodes[reading.weigher], y)
        if reading.dense:
            factor = call(graph, aten.gather.default, (factor, 1, chosen), like=y)
        w = [_node(gm, stem, recipe, y) for recipe in (stacks.w_in, stacks.w_out, stacks.b_in, stacks.b_out)]
        args = (x, factor, chosen, *w, None, reading.act, *([0, True] if reading.weight_on_input else []))
        new = call(graph, moec.experts.default, args, like=y)
        if y.meta["val"].dim() != 2:
            new = call(graph, aten.view_as.default, (new, site.cut.entry), like=y)
        if new.meta["val"].dtype != y.meta["val"].dtype:
            new = call(graph, aten.to.dtype, (new, y.meta["val"].dtype), like=y)
    replace(y, new)


def _rows(gm: GraphModule, node: Node, like: Node) -> Node:
    """[.., n] -> [rows, n]."""
    if node.meta["val"].dim() == 2:
        return node
    return call(gm.graph, aten.flatten.using_ints, (node, 0, -2), like=like)


def _node(gm: GraphModule, stem: str, recipe: Weight | None, like: Node) -> Node | None:
    """A node for a recipe: an existing one where the graph has it."""
    if recipe is None:
        return None
    for name, weight in weights_of(gm).items():
        if weight is recipe:
            node = gm.graph.get_attr(name)
            node.meta["val"] = getattr(gm, name)
            break
    else:
        node = weight_node(gm, f"{stem}_stack", recipe)
    if layer_of(like) is not None:
        node.meta["layer"] = layer_of(like)
    return node
