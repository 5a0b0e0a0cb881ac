"""Stores weights in the formats that were asked for, and keeps those of a quantised checkpoint as they are.

Before:  y = moec.grouped_gemm(x, w, ..)       w = stack(source, source, ..)
After:   y = moec.grouped_gemm(x, w_quantised, ..)       w_quantised = stack(quantise(source, "int4-g128"), ..)

The numbers of a quantised weight are those that its codes mean, so the graph can be evaluated as before; lowering
stores codes and scales. Weights are told apart by what reads them:
    experts     the stacks of moec::experts, grouped_gemm and combine_gemm, shared experts included
    dense       moec::gated_mlp
    attention   aten.linear inside a layer, with 32 rows or more (fewer: gates of shared experts and the like)
    lm_head     aten.linear outside of the layers
    embedding   aten.embedding
    router      moec::gate_linear
Under a size budget the experts' formats are chosen by measured sensitivity (passes/quantising).
What is not asked for stays, and so do both stacks of a layer for which bf16-packed has no room. Of a quantised
checkpoint, groups that a table of indices names (g_idx) are brought into the plain form where the table says nothing
else.

Leaves alone: weights that the graph computes; those whose stored form is none of passes/ir/formats.py, which are then
         kept as their numbers.
Needs:   canonical experts (stack-expert-weights), linear layers (layout-weights).  Gives: weights with formats.
Source:  passes/ir/formats.py has the formats and their sources.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import calls, remove_dead
from moec.passes.ir import packed
from moec.passes.ir.formats import WeightFormat
from moec.passes.ir.quantised import (
    formats_of,
    is_stored_quantised,
    parts_by_expert,
    plainly_grouped,
    quantised,
    quantised_by_expert,
    refusal,
)
from moec.passes.ir.weights import Weight, weight_node, weight_of
from moec.passes.quantising.plan import SizeBudget, experts_within

aten, moec = torch.ops.aten, torch.ops.moec
ROLES = ("experts", "dense", "attention", "lm_head", "embedding", "router")
LEAST_ROWS = 32

WEIGHT_ARGUMENTS = {
    moec.experts.default: (3, 4),
    moec.grouped_gemm.default: (1,),
    moec.combine_gemm.default: (1,),
    moec.gated_mlp.default: (1, 2),
    moec.gate_linear.default: (1,),
    aten.linear.default: (1,),
    aten.embedding.default: (0,),
}
_ROLE: dict[Any, str] = {
    moec.gated_mlp.default: "dense",
    moec.gate_linear.default: "router",
    aten.embedding.default: "embedding",
}


@dataclasses.dataclass(frozen=True)
class WeightPlan:
    """What to store how.

    by_role: role -> format.  by_expert: name of a stack of experts -> the format of each expert, before `by_role`.
    budget: a size from which by_expert is chosen, once what by_role says is done.
    """

    by_role: Mapping[str, WeightFormat] = dataclasses.field(default_factory=dict)
    by_expert: Mapping[str, tuple[WeightFormat, ...]] = dataclasses.field(default_factory=dict)
    budget: SizeBudget | None = None


class QuantiseWeights:
    """See the module. Its option in PassContext is a WeightPlan."""

    name = "quantise-weights"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        plan = context.options.get(self.name, WeightPlan())
        entries, changed = _apply(gm, context, plan)
        if plan.budget is not None and not _experts_rounded(gm):
            chosen = experts_within(gm, context.read, plan.budget)
            entries, also = _apply(gm, context, dataclasses.replace(plan, by_expert=chosen))
            changed |= also
        return PassResult(gm, changed, Ledger.of(entries))


def _experts_rounded(gm: GraphModule) -> bool:
    """Whether stacks of experts have been quantised by this pass: their format was asked for, or it has run before."""
    for node in calls(gm, *WEIGHT_ARGUMENTS):
        if role_of(node) == "experts":
            weights = [stored_weight(gm, node.args[place]) for place in WEIGHT_ARGUMENTS[node.target]]
            if any(w is not None and formats_of(w) and not is_stored_quantised(w) for w in weights):
                return True
    return False


def _apply(gm: GraphModule, context: PassContext, plan: WeightPlan) -> tuple[list[Match | NoMatch], bool]:
    """Every weight as the plan wants it -> what the ledger says, and whether anything changed."""
    entries: list[Match | NoMatch] = []
    changed = False
    made: dict[Weight, Node] = {}
    refused = _not_packed(gm, context, plan)
    others = {role: format for role, format in plan.by_role.items() if role != "experts"}
    without = dataclasses.replace(plan, by_role=others) if refused else plan
    for node in calls(gm, *WEIGHT_ARGUMENTS):
        kept = refused.get(_layer_of_experts(node))
        for place in WEIGHT_ARGUMENTS[node.target]:
            weight = stored_weight(gm, node.args[place])
            if weight is None:
                continue
            new = _wanted(weight, plainly_grouped(weight, context.read), node, place, without if kept else plan)
            if new != weight:
                _replace(gm, node, place, new, made)
                changed = True
            entry = _kept_entry(node, place, new, kept) if kept else _entry(node, place, new)
            entries += [entry] if entry else []
    if changed:
        remove_dead(gm)
    return entries, changed


def _layer_of_experts(node: Node) -> Node:
    """One node for both calls of a layer that is written as two."""
    first = node.args[0] if node.target is moec.combine_gemm.default else node
    return first if isinstance(first, Node) and first.target is moec.grouped_gemm.default else node


def _not_packed(gm: GraphModule, context: PassContext, plan: WeightPlan) -> dict[Node, str]:
    """_layer_of_experts -> why its stacks are not packed, which were to be. Cost: reads them, an expert at a time."""
    format, found = plan.by_role.get("experts"), dict[Node, str]()
    if format is None or not format.is_packed or context.read is None:
        return found
    for node in calls(gm, *WEIGHT_ARGUMENTS):
        for place in WEIGHT_ARGUMENTS[node.target] if role_of(node) == "experts" else ():
            weight, name = stored_weight(gm, node.args[place]), str(node.args[place])
            if weight is None or _layer_of_experts(node) in found:
                continue
            if formats_of(weight) and not is_stored_quantised(weight):  # this pass has run before
                continue
            for e, parts in enumerate(parts_by_expert(quantised(weight, format, name), context.read)):
                if reason := packed.refusal(parts.codes):
                    found[_layer_of_experts(node)] = f"{name}, expert {e}: {reason}"
                    break
    return found


def _kept_entry(node: Node, place: int, weight: Weight, reason: str) -> NoMatch:
    stored = ", ".join(f.name for f in formats_of(weight)) or str(weight.dtype)
    return NoMatch(f"experts: kept as {stored}: {reason}", str(node.args[place]), layer_of(node))


def stored_weight(gm: GraphModule, node: object) -> Weight | None:
    """The matrix or stack that a get_attr node names; None for anything else."""
    weight = weight_of(gm, node)
    return weight if weight is not None and len(weight.shape) > 1 and weight.dtype.is_floating_point else None


def role_of(node: Node) -> str:
    """What a weight is, by the call that reads it."""
    if node.target is aten.linear.default:
        return "lm_head" if layer_of(node) is None else "attention"
    return _ROLE.get(node.target, "experts")


def _wanted(was: Weight, weight: Weight, node: Node, place: int, plan: WeightPlan) -> Weight:
    """The weight as the plan wants it. Raises: FormatError: it does not fit its format."""
    role, name = role_of(node), str(node.args[place])
    if formats_of(was) and not is_stored_quantised(was):
        return was  # this pass has run before
    what = f"layer {layer_of(node)}, {name}" if layer_of(node) is not None else name
    if role == "experts" and name in plan.by_expert:
        return quantised_by_expert(weight, plan.by_expert[name], what)
    format = plan.by_role.get(role)
    if format is None or (role == "attention" and weight.shape[0] < LEAST_ROWS):
        return weight
    return quantised(weight, format, what)


def _replace(gm: GraphModule, node: Node, place: int, weight: Weight, made: dict[Weight, Node]) -> None:
    """Lets one call read another weight; equal weights share a node."""
    old = node.args[place]
    assert isinstance(old, Node)
    if weight not in made:
        with gm.graph.inserting_before(min(node, old)):
            made[weight] = weight_node(gm, f"{old.target}_quantised", weight)
            made[weight].meta["layer"] = layer_of(old)
    node.update_arg(place, made[weight])


def _entry(node: Node, place: int, weight: Weight) -> Match | NoMatch | None:
    """What the ledger says of a weight that is quantised, or was in the checkpoint and is not kept so."""
    name, layer = str(node.args[place]), layer_of(node)
    formats = formats_of(weight)
    if not formats:
        reason = f"{role_of(node)}: kept as numbers of {weight.dtype}: {refusal(weight)}"
        return NoMatch(reason, name, layer) if is_stored_quantised(weight) else None
    names = [f.name for f in formats]
    counts = ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names)) if len(names) > 1 else names[0]
    how = "as in the checkpoint" if is_stored_quantised(weight) else "quantised here"
    return Match(name, layer, f"{role_of(node)}: {counts}, {how}")
