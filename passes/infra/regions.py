"""The pieces of a graph that a pass changed, found from the two graphs alone."""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Collection, Iterable

import torch
from torch import Tensor
from torch.fx import Graph, Node

from moec.passes.infra.compare import CHOOSING
from moec.passes.infra.kinds import node_text, numbering, recipe_text
from moec.passes.infra.rewrite import FIRST_IS_TEMPLATE, PRODUCTS, in_order
from moec.passes.infra.snapshot import Snapshot, changed_names


@dataclasses.dataclass(frozen=True)
class Side:
    """One version of a region, with what is needed to run it."""

    nodes: tuple[Node, ...]
    snapshot: Snapshot

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that its nodes read, each counted once."""
        used = {str(n.target) for n in self.nodes if n.op == "get_attr"}
        return sum(w.num_bytes for name, w in self.snapshot.weights.items() if name in used)


@dataclasses.dataclass(frozen=True)
class ChangedRegion:
    """A changed piece, before and after. inputs and outputs: names that both graphs have."""

    layer: int | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    before: Side
    after: Side


def changed_regions(before: Snapshot, after: Snapshot) -> list[ChangedRegion]:
    """The changed pieces that something outside reads, in the order of the new graph."""
    changed = changed_names(before, after)
    groups = _connected(changed, (before, after))
    enter = [_not_to_invent(s.graph) for s in (before, after)]
    regions = []
    for group in groups:
        outputs = tuple(n.name for n in in_order(_read_outside(group, after)) if n.name in before.nodes)
        if not outputs:
            continue
        # what another region shows to be equal is given to both sides: regions do not grow with the depth of the model
        entered = {n for n in changed if n in group or n not in before.nodes or n not in after.nodes}
        sides, inputs = _both_sides((before, after), outputs, entered, enter)
        layer = after.nodes[outputs[0]].meta.get("layer")
        regions.append(ChangedRegion(layer, inputs, outputs, *sides))
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
) -> tuple[tuple[Side, Side], tuple[str, ...]]:
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
            sides = [Side(nodes, s) for (nodes, _), s in zip(slices, snapshots, strict=True)]
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
            if isinstance(p.meta.get("val"), torch.SymInt):
                continue
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


def kind_of_change(region: ChangedRegion) -> str:
    """Equal for regions that differ in names only: both versions' calls, shapes and weight recipes."""
    digest, number = hashlib.sha256(), numbering()
    for side in (region.before, region.after):
        for node in side.nodes:
            digest.update(node_text(node, number).encode())
            weight = side.snapshot.weights.get(str(node.target)) if node.op == "get_attr" else None
            digest.update(recipe_text(weight, number).encode() if weight else b"")
    digest.update(" ".join(number(n) for n in (*region.inputs, *region.outputs)).encode())
    return digest.hexdigest()
