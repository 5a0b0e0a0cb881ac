"""Evidence that a pass kept the meaning: what changed is found from the two graphs alone, and evaluated both ways.

The graphs are lined up by node name, target and arguments. Changed nodes that touch form a region; its outputs are its
values that unchanged nodes read. Both versions run on the same probe inputs with the real weights of that layer.
Whatever a pass claims in its ledger is not consulted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from moec.passes.infra.compare import CHOOSING, compare, tied_rows
from moec.passes.infra.errors import PassError
from moec.passes.infra.kinds import node_text, numbering, recipe_text
from moec.passes.infra.probes import PROBES, Probe, make, symbol_values
from moec.passes.infra.rewrite import FIRST_IS_TEMPLATE, PRODUCTS, in_order
from moec.passes.ir.evaluate import Constant, attribute, constants_of, run_nodes
from moec.passes.ir.weights import Read, Weight, weights_of

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest |before - after| over largest |before|, by dtype: a few roundings of sums in another order."""

BUDGET_BYTES = 3 << 30
"""A region whose weights need more is recorded as not evaluated."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One region under one probe. site: its first output. regions: how many of this kind there are.

    max_rel_err: None where it was not evaluated (note says why). weights: "checkpoint" or "random".
    """

    pass_name: str
    layer: int | None
    site: str
    probe: str
    max_rel_err: float | None
    tolerance: float
    regions: int
    weights: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A graph as it was: its nodes by name in order, its weights, and its plain attributes."""

    graph: Graph
    nodes: dict[str, Node]
    weights: dict[str, Weight]
    plain: dict[str, Tensor]

    def differs(self, gm: GraphModule) -> bool:
        """Whether the module's graph is another one now."""
        return bool(_changed(self, take(gm)))

    def constants(self, read: Read | None) -> Constant:
        return constants_of(self.weights, self.plain.__getitem__, read)


def take(gm: GraphModule) -> Snapshot:
    """A copy of the graph and of its tables; no tensor is copied. Cost: about 15 us per node."""
    graph, copied = Graph(), {}
    for node in gm.graph.nodes:
        new = graph.node_copy(node, copied.__getitem__)
        new.name = node.name
        copied[node] = new
    weights = weights_of(gm)
    named = {str(n.target) for n in graph.find_nodes(op="get_attr")}
    plain = {name: attribute(gm, name) for name in named - weights.keys()}
    return Snapshot(graph, {n.name: n for n in graph.nodes}, dict(weights), plain)


@dataclasses.dataclass(frozen=True)
class _Side:
    """One version of a region, with what is needed to run it."""

    nodes: tuple[Node, ...]
    snapshot: Snapshot

    @property
    def weight_bytes(self) -> int:
        used = {str(n.target) for n in self.nodes if n.op == "get_attr"}
        return sum(w.num_bytes for name, w in self.snapshot.weights.items() if name in used)


@dataclasses.dataclass(frozen=True)
class _Region:
    """A changed piece, before and after. inputs and outputs: names that both graphs have."""

    layer: int | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    before: _Side
    after: _Side


@torch.no_grad()
def gather(pass_name: str, before: Snapshot, gm: GraphModule, read: Read | None, *, every: bool) -> list[Evidence]:
    """Evaluates what a pass changed. every: all regions, else one of each kind.

    Raises: PassError: a region differs, or runs no more; the message names pass, layer and site.
    """
    after = take(gm)
    _check_ends(pass_name, before, after)
    kinds: dict[str, list[_Region]] = {}
    for region in _regions(before, after):
        kinds.setdefault(_kind(region), []).append(region)
    records = []
    for alike in kinds.values():
        for region in alike if every else alike[:1]:
            records += _evaluate(pass_name, region, read, 1 if every else len(alike))
    return records


def _check_ends(pass_name: str, before: Snapshot, after: Snapshot) -> None:
    """Inputs and outputs keep their names; everything else can be compared by value."""
    for what, op in (("inputs", "placeholder"), ("outputs", "output")):
        ends = [[_ends(n) for n in s.graph.find_nodes(op=op)] for s in (before, after)]
        if ends[0] != ends[1]:
            raise PassError(f"pass {pass_name}: the graph's {what} were {ends[0]}, are {ends[1]}")


def _ends(node: Node) -> str:
    return node.name if node.op == "placeholder" else str(_named(node.args))


def _named(args: Any) -> Any:
    return map_aggregate(args, lambda a: f"%{a.name}" if isinstance(a, Node) else a)


def _changed(before: Snapshot, after: Snapshot) -> set[str]:
    """Names of values that only one graph has, or that the two make differently."""
    names = set(before.nodes.keys() ^ after.nodes.keys())
    for name in before.nodes.keys() & after.nodes.keys():
        if not _same(before, after, name):
            names.add(name)
    return names


def _same(before: Snapshot, after: Snapshot, name: str) -> bool:
    a, b = before.nodes[name], after.nodes[name]
    if a.op != b.op or a.target != b.target:
        return False
    if a.op == "get_attr":
        x, y = before.weights.get(str(a.target)), after.weights.get(str(b.target))
        return x is y or x == y
    return _named(a.args) == _named(b.args) and _named(a.kwargs) == _named(b.kwargs)


def _regions(before: Snapshot, after: Snapshot) -> list[_Region]:
    """The changed pieces that something outside reads, in the order of the new graph."""
    changed = _changed(before, after)
    groups = _connected(changed, (before, after))
    enter = [_not_to_invent(s.graph) for s in (before, after)]
    regions = []
    for group in groups:
        outputs = tuple(n.name for n in in_order(_read_outside(group, after)) if n.name in before.nodes)
        if not outputs:
            continue
        sides, inputs = _both_sides((before, after), outputs, changed, enter)
        layer = after.nodes[outputs[0]].meta.get("layer")
        regions.append(_Region(layer, inputs, outputs, *sides))
    return sorted(regions, key=lambda r: after.nodes[r.outputs[0]])


def _connected(changed: set[str], snapshots: tuple[Snapshot, Snapshot]) -> list[set[str]]:
    """Changed calls, joined along data edges within one layer (a table that all layers read joins nothing)."""
    root = {n: n for n in changed}

    def find(n: str) -> str:
        while root[n] != n:
            root[n] = root[root[n]]
            n = root[n]
        return n

    for snapshot in snapshots:
        for name in changed & snapshot.nodes.keys():
            node = snapshot.nodes[name]
            for p in node.all_input_nodes:
                same_layer = p.meta.get("layer") == node.meta.get("layer")
                if p.name in changed and p.op == node.op == "call_function" and same_layer:
                    root[find(p.name)] = find(name)
    groups: dict[str, set[str]] = {}
    for name in changed:
        groups.setdefault(find(name), set()).add(name)
    return list(groups.values())


def _read_outside(group: set[str], after: Snapshot) -> Iterable[Node]:
    """The group's values that an unchanged node, or another changed group, reads; and its cache writes."""
    for name in group & after.nodes.keys():
        node = after.nodes[name]
        writes = getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        if any(u.name not in group for u in node.users) or writes:
            yield node


def _both_sides(
    snapshots: tuple[Snapshot, Snapshot], outputs: tuple[str, ...], changed: set[str], enter: list[set[str]]
) -> tuple[tuple[_Side, _Side], tuple[str, ...]]:
    """Both versions of a region, and the inputs.

    What one version computes, the other must not be given; what only the new version reads follows from something that
    the old one read, or an equal value was merged into it: both compute it. Nor can a value be given that follows from
    others of the region by simple arithmetic.
    """
    computed: set[str] = set()
    while True:
        slices = [_slice(s, outputs, changed | computed | e) for s, e in zip(snapshots, enter, strict=True)]
        inside = {n.name for nodes, _ in slices for n in nodes}
        reads = dict.fromkeys(r for _, names in slices for r in names)
        anew = {r for r in set(slices[1][1]) - set(slices[0][1]) if snapshots[1].nodes[r].op == "call_function"}
        known = (inside | reads.keys()) - enter[1] - enter[0]
        clash = (inside & reads.keys()) | anew
        clash |= {r for r in reads if _follows((snapshots[0].nodes.get(r) or snapshots[1].nodes[r]), known)}
        if not clash:
            sides = [_Side(nodes, s) for (nodes, _), s in zip(slices, snapshots, strict=True)]
            return (sides[0], sides[1]), tuple(reads)
        computed |= clash


def _follows(node: Node, known: Collection[str], limit: int = 100) -> bool:
    """Whether a value is made from known ones without a product in between."""
    seen, todo = {node}, [node]
    while todo and len(seen) < limit:
        current = todo.pop()
        if current.op != "call_function" or _mixes(current):
            continue
        for p in current.all_input_nodes:
            if p.name in known and p.op == "call_function":
                return True
            if p not in seen:
                seen.add(p)
                todo.append(p)
    return False


def _slice(snapshot: Snapshot, outputs: tuple[str, ...], enter: set[str]) -> tuple[tuple[Node, ...], list[str]]:
    """Backwards from the outputs to the first values outside of `enter`: the nodes in order, and the values read."""
    inside: dict[Node, None] = {snapshot.nodes[n]: None for n in outputs}
    todo, reads = list(inside), []
    while todo:
        for p in todo.pop().all_input_nodes:
            if p in inside:
                continue
            if p.op == "placeholder" or p.name not in enter:
                reads.append(p.name)
            else:
                inside[p] = None
                todo.append(p)
    return tuple(in_order(inside)), reads


def _not_to_invent(graph: Graph) -> set[str]:
    """Values that a probe cannot make up, so that a region computes them from what they follow from.

    Weights; fillings (zeros_like); several results at once; what follows from integer inputs and weights alone without
    an embedding (tables, sizes, masks); integers made from integers (slot orders); what follows from an ATen top-k up
    to the next product (its values, indices and masks belong together).
    """
    fixed: set[str] = set()
    chosen: set[str] = set()
    found: set[str] = set()
    for node in graph.nodes:
        producers = node.all_input_nodes
        val = node.meta.get("val")
        if node.op == "placeholder" and not (isinstance(val, Tensor) and val.dtype.is_floating_point):
            fixed.add(node.name)
        if isinstance(val, torch.SymInt):
            fixed.add(node.name)  # a probe knows every size
            continue
        if node.op == "get_attr" or (
            node.op == "call_function"
            and node.target is not torch.ops.aten.embedding.default
            and all(p.name in fixed for p in producers)
        ):
            fixed.add(node.name)
        routed = any(p.name in chosen for p in producers)
        alone = all(p.name in chosen or p.name in fixed for p in producers)
        if node.target in CHOOSING or (routed and (alone or not _mixes(node)) and not _is_ours(node)):
            chosen.add(node.name)
        if node.name in fixed or node.name in chosen or node.target in FIRST_IS_TEMPLATE or _derived(node):
            found.add(node.name)
    return found


def _mixes(node: Node) -> bool:
    """Whether a call does more than simple arithmetic: products, and every moec op."""
    return _is_ours(node) or node.target in PRODUCTS


def _is_ours(node: Node) -> bool:
    return getattr(node.target, "namespace", "") == "moec"


def _derived(node: Node) -> bool:
    """Several results at once, or integers made from integers."""
    val = node.meta.get("val")
    if isinstance(val, (tuple, list)):
        return True
    if not isinstance(val, Tensor) or val.dtype.is_floating_point or node.op != "call_function":
        return False
    maker = node.args[0] if node.target is operator.getitem else node
    assert isinstance(maker, Node)
    read = [n.meta.get("val") for n in maker.all_input_nodes]
    return not any(isinstance(v, Tensor) and v.dtype.is_floating_point for v in read)


def _kind(region: _Region) -> str:
    """Equal for regions that differ in names only: both versions' calls, shapes and weight recipes."""
    digest, number = hashlib.sha256(), numbering()
    for side in (region.before, region.after):
        for node in side.nodes:
            digest.update(node_text(node, number).encode())
            weight = side.snapshot.weights.get(str(node.target)) if node.op == "get_attr" else None
            digest.update(recipe_text(weight, number).encode() if weight else b"")
    digest.update(" ".join(number(n) for n in (*region.inputs, *region.outputs)).encode())
    return digest.hexdigest()


def _evaluate(pass_name: str, region: _Region, read: Read | None, regions: int) -> list[Evidence]:
    """The records of one region, one per probe."""
    site = region.outputs[0]
    where = f"pass {pass_name}: layer {region.layer}, {site}"
    tolerance = max(TOLERANCE.get(d, 0.0) for d in _dtypes(region))
    weights = "random" if read is None else "checkpoint"
    record = functools.partial(
        Evidence, pass_name, region.layer, site, tolerance=tolerance, regions=regions, weights=weights
    )
    needed = max(region.before.weight_bytes, region.after.weight_bytes)
    if needed > BUDGET_BYTES:
        note = f"its weights need {needed >> 20} MiB, more than {BUDGET_BYTES >> 20} MiB"
        return [record(probe="none", max_rel_err=None, note=note)]
    made = [_cached(side.snapshot.constants(read)) for side in (region.before, region.after)]
    records = []
    for probe in PROBES:
        given = _inputs(region, probe)
        first, undetermined = _run_before(region, given, made[0])
        if first is None:
            records.append(record(probe=probe.name, max_rel_err=None, note=undetermined))
            continue
        second = _run_after(where, probe, region, given, made[1])
        compared = compare(first, second, _routings(region), undetermined)
        if not compared.error <= tolerance:
            raise PassError(
                f"{where}: probe {probe.name!r}: {compared.what} differs by {compared.error:.2e} relative, "
                f"tolerance {tolerance:.0e}; this pass changed the meaning (weights: {weights})"
            )
        records.append(record(probe=probe.name, max_rel_err=compared.error, note=compared.note))
    return records


def _cached(constant: Constant) -> Constant:
    return functools.cache(constant)


def _dtypes(region: _Region) -> set[torch.dtype]:
    """The floating dtypes inside a region: the coarsest decides the tolerance."""
    nodes = (*region.before.nodes, *region.after.nodes)
    found = {v.dtype for n in nodes if isinstance(v := n.meta.get("val"), Tensor) and v.dtype.is_floating_point}
    return found or {torch.float32}


def _inputs(region: _Region, probe: Probe) -> dict[str, Any]:
    graph = region.after.snapshot.graph
    values = symbol_values(graph, probe.tokens)
    given = {}
    for name in region.inputs:
        node = region.after.snapshot.nodes.get(name) or region.before.snapshot.nodes[name]
        users = [
            u for s in (region.before, region.after) for u in s.nodes if name in {p.name for p in u.all_input_nodes}
        ]
        given[name] = make(node, probe, values, users)
    return given


def _fresh(given: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs that a run may write to."""
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in given.items()}


def _run_before(region: _Region, given: Mapping[str, Any], constant: Constant) -> tuple[dict[str, Any] | None, Any]:
    """Outputs and which rows a tie leaves open; (None, why) where the captured graph itself cannot run this probe."""
    mine, nodes = _fresh(given), region.before.nodes
    choices = [n for n in nodes if n.target in CHOOSING]
    keep = {*region.outputs, *(n.args[0].name for n in choices)}
    try:
        values = run_nodes(nodes, mine, constant, {n for n in keep if n not in mine}) | mine
    except Exception as error:
        return None, f"the graph before does not run this probe: {type(error).__name__}: {error}"[:200]
    first = values[region.outputs[0]]
    rows = first.shape[0] if isinstance(first, Tensor) and first.dim() else 0
    open_rows = tied_rows([(n.target, values[n.args[0].name], n.args[1:]) for n in choices], rows)
    return _observed(region, values, mine), open_rows


def _run_after(
    where: str, probe: Probe, region: _Region, given: Mapping[str, Any], constant: Constant
) -> dict[str, Any]:
    mine = _fresh(given)
    try:
        values = run_nodes(region.after.nodes, mine, constant, set(region.outputs) - set(mine)) | mine
    except Exception as error:
        raise PassError(f"{where}: probe {probe.name!r}: no longer runs: {type(error).__name__}: {error}") from error
    return _observed(region, values, mine)


def _observed(region: _Region, values: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What can be seen of a region: its outputs, and its inputs as it left them (caches)."""
    return {n: values[n] for n in region.outputs} | {f"input {n}": v for n, v in inputs.items()}


def _routings(region: _Region) -> list[tuple[str, str]]:
    """Outputs that are the weights and the experts of one moec op: together they are a map, in no order."""
    names, pairs = set(region.outputs), []
    for node in region.after.snapshot.graph.find_nodes(op="call_function", target=torch.ops.moec.experts.default):
        weights, experts = (getattr(a, "name", None) for a in node.args[1:3])
        if weights in names and experts in names:
            pairs.append((weights, experts))
    return pairs
