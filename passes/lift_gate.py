"""Lifts the routing in front of moec::experts, in whatever spelling, to one moec::gate with a GateSpec.

Before:
    softmax: f32[T, 8] = aten.softmax.int(linear, -1)
    topk: (f32[T, 2], i64[T, 2]) = aten.topk(softmax, 2)
    ..
    div: f32[T, 2] = aten.div.Tensor(getitem, sum)
    experts: bf16[T, 32] = moec.experts(x, div, getitem_1, ..)
After:
    gate: (f32[T, 2], i32[T, 2]) = moec.gate(linear, None, '{"renormalise":true,"top_k":2}')
    div: f32[T, 2] = getitem(gate, 0)
    getitem_1: i32[T, 2] = getitem(gate, 1)
    experts: bf16[T, 32] = moec.experts(x, div, getitem_1, ..)

The piece between the router's product and the experts is cut out by dataflow, candidates are read from its ops and
numbers, and one is accepted only when it agrees on probe logits (see lifting/gate_reading.py).

Where the weights are then multiplied by a factor of each chosen expert, the gate ends before that product.

Leaves alone: routing that reads anything beside one [T, E] value; rules that GateSpec does not have.
Needs: meta["val"].  Gives: weights f32, experts i32.
Source: docs/models.md, the 20 spellings of 33 families.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.kinds import kind_of
from moec.passes.infra.rewrite import Region, call, call_many, calls, cut, remove_dead, replace_or_cast, weighs
from moec.passes.ir.evaluate import Constant, constants
from moec.passes.lifting.gate_reading import GateRegion, ReadGate, read_gate

aten, moec = torch.ops.aten, torch.ops.moec


@dataclasses.dataclass(frozen=True)
class LiftGate:
    """See the module."""

    name: str = "lift-gate"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        constant = constants(gm, context.read)
        known: dict[str, ReadGate | str] = {}
        entries: list[Match | NoMatch] = []
        for site in calls(gm, moec.experts.default):
            found = self.check(site, constant, known)
            if isinstance(found, NoMatch):
                entries.append(found)
                continue
            gate, reading = found
            self.rewrite(gm, gate, reading)
            entries.append(Match(site.args[1].name, layer_of(site), reading.spec.encode()))  # type: ignore[union-attr]
        ledger = Ledger.of(entries)
        if ledger.matched:
            remove_dead(gm)
        return PassResult(gm, bool(ledger.matched), ledger)

    def check(
        self, site: Node, constant: Constant, known: dict[str, ReadGate | str]
    ) -> tuple[GateRegion, ReadGate] | NoMatch:
        """The gate of one experts call, read once per kind of region. known: readings by kind, filled here."""
        weights, experts = site.args[1], site.args[2]
        if not isinstance(weights, Node) or not isinstance(experts, Node):
            return NoMatch("the routing is a constant", site.name, layer_of(site))
        reason = ""
        unscaled = _without_factor(weights, experts)
        candidates = pattern(weights, experts)
        for gate in candidates if unscaled is None else itertools.chain(pattern(unscaled, experts), candidates):
            if isinstance(gate, str):
                return NoMatch(reason or gate, site.name, layer_of(site))
            kind = kind_of(gate.region)
            if kind not in known:
                known[kind] = read_gate(gate, constant)
            reading = known[kind]
            if not isinstance(reading, str):
                return gate, reading
            reason = reason or reading
        return NoMatch(reason or "no value [T, E] lies between a product and the experts", site.name, layer_of(site))

    def rewrite(self, gm: GraphModule, gate: GateRegion, reading: ReadGate) -> None:
        """Puts one moec::gate behind the logits; its results take over both names."""
        logits, bias = gate.logits, None if reading.bias is None else gate.biases[reading.bias]
        with gm.graph.inserting_before(max(logits, bias or logits).next):
            if logits.meta["val"].dim() != 2:
                logits = call(gm.graph, aten.flatten.using_ints, (logits, 0, -2), like=gate.weights)
            if bias is not None and bias.meta["val"].dim() != 1:
                bias = call(gm.graph, aten.flatten.using_ints, (bias,), like=gate.weights)
            args = (logits, bias, reading.spec.encode())
            weights, experts = call_many(gm.graph, moec.gate.default, args, like=gate.weights)
        replace_or_cast(gate.weights, weights)
        for node in reversed(gate.region.nodes):  # what read the experts on the way to the weights asks for no cast
            if node not in (gate.weights, gate.experts) and not node.users:
                gm.graph.erase_node(node)
        replace_or_cast(gate.experts, experts)


def pattern(weights: Node, experts: Node) -> Iterator[GateRegion | str]:
    """Regions between one [.., E] value and the routing, the largest first; a str: there is none, and why."""
    if weights.target is torch.ops.moec.gate.default or _gate_result(weights):
        yield "already a moec gate"
        return
    region = cut((weights, experts), weighs)
    if region is None:
        yield "the routing has more than 400 operations"
        return
    if len(region.inputs) != 1:
        names = ", ".join(n.name for n in region.inputs) or "nothing"
        yield f"the routing reads {names}; a gate reads one value"
        return
    constant = _constants_inside(region)
    for logits in (region.inputs[0], *_narrow(region, region.inputs[0], constant)):
        shape = logits.meta["val"].shape
        if not logits.meta["val"].dtype.is_floating_point or not isinstance(shape[-1], int) or len(shape) < 2:
            continue
        inner = cut((weights, experts), functools.partial(_ends, logits))
        if inner is None or inner.inputs != (logits,):
            continue
        biases = [n for n in inner.nodes if n in constant and _is_bias(n, shape[-1], constant)]
        yield GateRegion(inner, logits, weights, experts, tuple(biases))


def _without_factor(weights: Node, experts: Node) -> Node | None:
    """What is multiplied by a factor of each chosen expert to give the weights (Gemma-4); None: no such factor."""
    if weights.target is not aten.mul.Tensor:
        return None
    for inner, factor in (weights.args, weights.args[::-1]):
        if isinstance(inner, Node) and isinstance(factor, Node) and factor is not experts:
            region = cut((factor,), lambda node: node is experts)
            if region is not None and region.inputs == (experts,):
                return inner
    return None


def _ends(logits: Node, node: Node) -> bool:
    return node is logits or weighs(node)


def _gate_result(node: Node) -> bool:
    maker = node.args[0] if node.args else None
    return isinstance(maker, Node) and maker.target in (moec.gate.default, moec.gate_linear.default)


def _constants_inside(region: Region) -> set[Node]:
    """Nodes of the region that depend on weights alone."""
    fixed: set[Node] = set()
    for n in region.nodes:
        made = n.op == "get_attr" or (bool(n.all_input_nodes) and all(p in fixed for p in n.all_input_nodes))
        if made:
            fixed.add(n)
    return fixed


def _narrow(region: Region, logits: Node, constant: set[Node]) -> Iterator[Node]:
    """Values that everything passes through, from the product onwards: logits plus a router bias, a cast, ..."""
    inside, at = set(region.nodes), logits
    while True:
        users = [u for u in at.users if u in inside]
        if len(users) != 1 or not isinstance(users[0].meta.get("val"), Tensor):
            return
        at = users[0]
        if any(
            p not in constant and p.op != "get_attr" and p in inside and p is not at for p in at.all_input_nodes[1:]
        ):
            return
        yield at


def _is_bias(node: Node, num_experts: int, constant: set[Node]) -> bool:
    """A constant of E numbers that meets a value of the gate (the last one of a chain of casts and views)."""
    val = node.meta.get("val")
    fits = isinstance(val, Tensor) and val.numel() == num_experts and val.dtype.is_floating_point
    return fits and any(u not in constant for u in node.users)
