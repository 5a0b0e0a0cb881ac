"""Gives every intermediate value a place in one arena, so that values which are never alive together share memory.

Before:  a = linear(x, w); b = silu(a); c = linear(b, v)                           a, b, c: 64*T bytes each
After:   the same graph; meta["memory_plan"]: a at 0, b at 64*T, c at 0; 128*T bytes in all
Leaves alone: inputs, weights, outputs, and values that are views of others (they live where those live).
Needs:   meta["val"].
Gives:   gm.meta["memory_plan"], a MemoryPlan of the graph's values. The runtime's arena is another: lowering places
         kernel results and scratch, known only once kernels are chosen.
Source:  greedy by size over shared objects (Pisarchyk and Lee, Efficient Memory Management for Deep Neural Net
         Inference, 2020), with sizes as polynomials: no two values overlap for any value of the symbols.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, PassContext, PassResult, layer_of
from moec.passes.infra.errors import PassError
from moec.passes.infra.polynomial import Polynomial, Size
from moec.passes.infra.rewrite import symbolic
from moec.passes.ir.text import symbol_letters

ALIGN_BYTES = 64
TYPICAL = 256  # the value of every symbol at which sizes are ordered; any gives a correct plan
MAY_ALIAS = ("reshape", "flatten", "contiguous", "to", "type_as", "chunk", "alias")


@dataclasses.dataclass(frozen=True)
class Lifetime:
    """A value that needs memory. first: the step that writes it; last: the last that reads it or a view of it."""

    name: str
    num_bytes: Size
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """offsets: by value name, multiples of 64 bytes; num_bytes: of the arena. Both ints or texts over the symbols."""

    offsets: Mapping[str, Size]
    num_bytes: Size


class PlanMemory:
    """Intermediate values get arena offsets."""

    name = "plan-memory"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        values = lifetimes(gm)
        plan = plan_memory(values)
        for number in (0, 1, 7, TYPICAL):
            clash = find_overlap(values, plan, dict.fromkeys(symbol_letters(gm).values(), number))
            if clash:
                raise PassError(f"the memory plan overlaps: {clash} with every symbol at {number}")
        gm.meta["memory_plan"] = plan
        layers = {n.name: layer_of(n) for n in gm.graph.nodes}
        matched = tuple(Match(v.name, layers[v.name], f"at {plan.offsets[v.name]}") for v in values)
        return PassResult(gm, False, Ledger(matched))


@dataclasses.dataclass
class _Place:
    """Memory that several values use one after the other."""

    size: Polynomial
    used: list[tuple[int, int]]

    def free(self, value: Lifetime) -> bool:
        return all(value.last < first or last < value.first for first, last in self.used)


def plan_memory(values: Sequence[Lifetime]) -> MemoryPlan:
    """Offsets such that values alive in a common step never overlap, whatever the (non-negative) symbols are.

    The largest value first; each takes the first place that is free over its whole life, or opens a new one. A place is
    as large as the greatest coefficient of each term among its values, so it holds each of them for every T.
    Raises: ValueError: two values of one name.  Cost: O(values * places).
    """
    if len({v.name for v in values}) != len(values):
        raise ValueError("two values of a memory plan have the same name")
    sizes = {v.name: Polynomial.of(v.num_bytes).rounded_up(ALIGN_BYTES) for v in values}
    places: list[_Place] = []
    place_of: dict[str, _Place] = {}
    for value in sorted(values, key=lambda v: (-_typical(sizes[v.name]), v.first, v.name)):
        place = next((p for p in places if p.free(value)), None)
        if place is None:
            place = _Place(sizes[value.name], [])
            places.append(place)
        place.size = place.size.join(sizes[value.name])
        place.used.append((value.first, value.last))
        place_of[value.name] = place
    offset, offsets = Polynomial({}), {}
    for place in places:
        offsets[id(place)] = offset.size
        offset = offset.plus(place.size)
    return MemoryPlan({v.name: offsets[id(place_of[v.name])] for v in values}, offset.size)


def _typical(size: Polynomial) -> int:
    symbols = {s for term in size.terms for factor in term for s in re.findall(r"[A-Za-z_]\w*", factor)}
    return size.value(dict.fromkeys(symbols, TYPICAL))


def find_overlap(values: Sequence[Lifetime], plan: MemoryPlan, symbols: Mapping[str, int]) -> str | None:
    """Two values that share bytes and a step, or one outside of the arena, for these symbols; None: no such."""
    end = Polynomial.of(plan.num_bytes).value(symbols)
    spans = []
    for v in values:
        start = Polynomial.of(plan.offsets[v.name]).value(symbols)
        spans.append((start, start + Polynomial.of(v.num_bytes).value(symbols), v))
        if start % ALIGN_BYTES or start < 0 or spans[-1][1] > end:
            return f"{v.name} at bytes {start} to {spans[-1][1]} of {end}"
    spans.sort(key=lambda s: s[0])
    for i, (_, stop, a) in enumerate(spans):
        for start, other_stop, b in spans[i + 1 :]:
            if start >= stop:
                break
            if other_stop > start and a.first <= b.last and b.first <= a.last:
                return f"{a.name} and {b.name}"
    return None


def lifetimes(gm: GraphModule) -> list[Lifetime]:
    """The tensors that the graph's calls make, in steps of the graph's nodes; views count as uses of what they view."""
    letters = symbol_letters(gm)
    owner: dict[Node, Node] = {}
    last: dict[Node, int] = {}
    kept: set[Node] = set()
    nodes = list(gm.graph.nodes)
    for step, node in enumerate(nodes):
        for operand in node.all_input_nodes:
            if operand in owner:
                last[owner[operand]] = step
                if node.op == "output":
                    kept.add(owner[operand])
        source = _viewed(node)
        if source is not None:
            owner[node] = owner.get(source, source)
        elif node.op == "call_function" and list(_tensors(node)):
            owner[node] = node
    found = []
    for step, node in enumerate(nodes):
        if owner.get(node) is node and node not in kept:
            num_bytes = Polynomial({})
            for tensor in _tensors(node):
                num_bytes = num_bytes.plus(_bytes(tensor, letters).rounded_up(ALIGN_BYTES))
            found.append(Lifetime(node.name, num_bytes.size, step, last.get(node, step)))
    return found


def _viewed(node: Node) -> Node | None:
    """The value whose memory a call's result may share; None: it has its own."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return node.args[0]  # type: ignore[return-value]
    schema = getattr(node.target, "_schema", None)
    aliases = schema is not None and any(r.alias_info is not None for r in schema.returns)
    may = getattr(getattr(node.target, "overloadpacket", None), "__name__", "") in MAY_ALIAS
    return node.all_input_nodes[0] if (aliases or may) and node.all_input_nodes else None


def _tensors(node: Node) -> Iterator[Tensor]:
    val = node.meta.get("val")
    for item in val if isinstance(val, (tuple, list)) else [val]:
        if isinstance(item, Tensor):
            yield item


def _bytes(tensor: Tensor, letters: Mapping[str, str]) -> Polynomial:
    total = Polynomial.of(tensor.dtype.itemsize)
    for size in tensor.shape:
        text = symbolic(size)
        if not isinstance(text, int):
            text = re.sub(r"[A-Za-z_]\w*", lambda m: letters.get(m[0], m[0]), str(text))
        total = total.times(Polynomial.of(text))
    return total
