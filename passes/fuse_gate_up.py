"""Joins a dense gated feed-forward: two projections of one input, activation, product, down projection.

Before:  y = aten.linear(mul(silu(linear(x, wg)), linear(x, wu)), wd)
After:   y = moec::gated_mlp(x, concat([wg, wu], 0), wd, None, None, "silu")           (the concat is a lazy weight)
Leaves alone: projections of different inputs or with one bias only; weights that are computed in the graph; a product
         that no known activation equals on probes; intermediate values that something else reads.
Needs:   meta["weights"].  Gives: the dense FFN as one op, the gate half first.
Source:  SwiGLU; the activation is named by evaluation, as capture does for experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import torch
from torch.fx import GraphModule, Node

import moec.passes.ir.ops
from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import argument, call, calls, in_order, is_call, remove_dead, replace
from moec.passes.infra.verify import SCALES, agreement, random_like, run
from moec.passes.ir.activation import FUNCTIONS, Activation
from moec.passes.ir.weights import concat, weight_node, weight_of, weights_of

aten, moec = torch.ops.aten, torch.ops.moec
CANDIDATES = tuple(f"{prefix}{fn}" for fn in FUNCTIONS for prefix in ("", "f32:"))
BETWEEN = 8  # nodes between the projections and their product


@dataclasses.dataclass(frozen=True)
class Ffn:
    """One site: the three projections, and the nodes that make `product` of gate and up."""

    gate: Node
    up: Node
    down: Node
    between: tuple[Node, ...]


class FuseGateUp:
    """Dense gated FFNs become moec::gated_mlp."""

    name = "fuse-gate-up"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        known: dict[Hashable, tuple[str, bool] | None] = {}
        entries: list[Match | NoMatch] = []
        for down in calls(gm, aten.linear.default):
            found = _find(down)
            if found is None:
                continue
            entries.append(found if isinstance(found, NoMatch) else _fuse(gm, found, known))
        changed = any(isinstance(e, Match) for e in entries)
        if changed:
            remove_dead(gm)
        return PassResult(gm, changed, Ledger.of(entries))


def _find(down: Node) -> Ffn | NoMatch | None:
    """The FFN that ends in a linear; None where its input is no product of two projections at all."""
    inside: dict[Node, None] = {}
    linears: dict[Node, None] = {}
    todo = [down.args[0]]
    while todo:
        node = todo.pop()
        if is_call(node, aten.linear.default):
            linears[node] = None
        elif node not in inside:
            if node.op != "call_function" or len(inside) == BETWEEN or not _elementwise(node):
                return None
            inside[node] = None
            todo += node.all_input_nodes
    if len(linears) != 2:
        return None
    first, second = in_order(linears)
    if first.args[0] is not second.args[0]:
        return NoMatch("its gate and up projections read different inputs", down.name, layer_of(down))
    for node in (*linears, *inside):
        if any(u is not down and u not in inside for u in node.users):
            return NoMatch(f"{node.name} is read elsewhere too", down.name, layer_of(down))
    return Ffn(first, second, down, tuple(in_order(inside)))


def _elementwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or is_call(node, aten.to.dtype)


def _fuse(gm: GraphModule, ffn: Ffn, known: dict[Hashable, tuple[str, bool] | None]) -> Match | NoMatch:
    name, layer = ffn.down.name, layer_of(ffn.down)
    reason = _why_not(gm, ffn)
    if reason:
        return NoMatch(reason, name, layer)
    key = _kind(ffn)
    if key not in known:
        known[key] = recognise(ffn)
    found = known[key]
    if found is None:
        return NoMatch("its product of gate and up equals no known activation on probes", name, layer)
    act, swapped = found
    gate, up = (ffn.up, ffn.gate) if swapped else (ffn.gate, ffn.up)
    x = gate.args[0]
    with gm.graph.inserting_before(ffn.down):
        w_in, b_in = (_joined(gm, gate, up, place) for place in (1, 2))
        args = (x, w_in, ffn.down.args[1], b_in, argument(ffn.down, 2, "bias"), act)
        replace(ffn.down, call(gm.graph, moec.gated_mlp.default, args, like=ffn.down))
    return Match(name, layer, act)


def _why_not(gm: GraphModule, ffn: Ffn) -> str | None:
    biases = [argument(n, 2, "bias") for n in (ffn.gate, ffn.up)]
    if (biases[0] is None) != (biases[1] is None):
        return "only one of its gate and up projections has a bias"
    for node in (ffn.gate.args[1], ffn.up.args[1], *(b for b in biases if b is not None)):
        if weight_of(gm, node) is None:
            return f"its weight {node} is computed in the graph"
    if ffn.gate.meta["val"].shape[-1] != ffn.up.meta["val"].shape[-1]:
        return "its gate and up projections differ in width"
    return None


def _joined(gm: GraphModule, gate: Node, up: Node, place: int) -> Node | None:
    """The concatenation of two projections' weights (place 1) or biases (place 2)."""
    parts = [argument(n, place, "bias") for n in (gate, up)]
    if parts[0] is None:
        return None
    weights = [weights_of(gm)[str(p.target)] for p in parts]
    return weight_node(gm, f"{parts[0].target}_and_up", concat(weights, 0))


def _kind(ffn: Ffn) -> Hashable:
    place = {n: i for i, n in enumerate((ffn.gate, ffn.up, *ffn.between))}
    dtypes = ffn.gate.meta["val"].dtype, ffn.up.meta["val"].dtype
    return dtypes, tuple(
        (str(n.target), str([f"%{place[a]}" if isinstance(a, Node) else a for a in n.args])) for n in ffn.between
    )


def recognise(ffn: Ffn) -> tuple[str, bool] | None:
    """The activation that the nodes between the projections compute, and whether the second projection is the gate."""
    for swapped in (False, True):
        for act in CANDIDATES:
            if all(_agrees(ffn, act, swapped, scale) for scale in SCALES):
                return act, swapped
    return None


def _agrees(ffn: Ffn, act: str, swapped: bool, scale: float) -> bool:
    generator = torch.Generator().manual_seed(0)
    first, second = (random_like(n, generator, scale) for n in (ffn.gate, ffn.up))
    product = ffn.between[-1]
    expected = run(ffn.between, {ffn.gate: first, ffn.up: second}, product)
    halves = (second, first) if swapped else (first, second)
    return agreement(expected, Activation.parse(act)(torch.cat(halves, -1))) is not None
