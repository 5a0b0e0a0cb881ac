"""The weights of a changed region, for both of its versions: made when they are first read.

A stack that only ops over experts read is made expert by expert, where each expert is made of tensors of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.fx import Node

from moec.passes.infra.regions import ChangedRegion, Side
from moec.passes.infra.stream import ExpertStack
from moec.passes.ir.evaluate import BY_EXPERT, made
from moec.passes.ir.quantised import same_numbers, unrounded, unstacked
from moec.passes.ir.weights import Read, Weight

Recipe = Weight | str
"""What a tensor is made by; of an attribute that is no weight, its name."""


class RegionWeights:
    """Both versions share the tensors of one recipe, and those that the new one alone rounds to a format.

    alike: whether both versions hold the same tensors, so that running them together needs no more memory.
    """

    def __init__(self, region: ChangedRegion, read: Read | None) -> None:
        self._read, self._plain = read, region.before.snapshot.plain | region.after.snapshot.plain
        old, new = region.before.snapshot.weights, region.after.snapshot.weights
        rounded = _rounded(region)
        self._before = {n: new[rounded[n]] if n in rounded else old.get(n, n) for n in _names(region.before)}
        self._after = {n: new.get(n, n) for n in _names(region.after)}
        whole = _read_whole(region.before, self._before) | _read_whole(region.after, self._after)
        self._known: dict[Recipe, Tensor | ExpertStack] = {}
        for recipe in {*self._before.values(), *self._after.values()} - whole:
            parts = unstacked(recipe) if isinstance(recipe, Weight) else None
            if parts:
                self._known[recipe] = ExpertStack(parts, lambda part: made(part, read))
        held = [{*names.values()} - self._known.keys() for names in (self._before, self._after)]
        self.alike = held[0] == held[1]

    def before(self, name: str) -> Any:
        """A weight of the old version, a tensor or an ExpertStack."""
        return self._get(self._before[name])

    def after(self, name: str) -> Any:
        """A weight of the new version, a tensor or an ExpertStack."""
        return self._get(self._after[name])

    def keep_after(self) -> None:
        """Drops what the new version does not read."""
        for recipe in self._known.keys() - self._after.values():
            del self._known[recipe]

    def _get(self, recipe: Recipe) -> Tensor | ExpertStack:
        if recipe not in self._known:
            self._known[recipe] = self._plain[recipe] if isinstance(recipe, str) else made(recipe, self._read)
        return self._known[recipe]


def _names(side: Side) -> list[str]:
    """The attributes that a version reads."""
    return sorted({str(n.target) for n in side.nodes if n.op == "get_attr"})


def _read_whole(side: Side, recipes: Mapping[str, Recipe]) -> set[Recipe]:
    """Those that something else than an op over experts reads, or such an op as something else than its stack."""
    inside = set(side.nodes)
    found = set()
    for node in side.nodes:
        if node.op == "get_attr" and not all(_reads_by_expert(u, node) for u in node.users if u in inside):
            found.add(recipes[str(node.target)])
    return found


def _reads_by_expert(user: Node, weight: Node) -> bool:
    op = BY_EXPERT.get(user.target)
    if op is None:
        return False
    others = [arg for place, arg in enumerate(user.args) if place not in op.places]
    return weight not in others and weight not in user.kwargs.values()


def _rounded(region: ChangedRegion) -> dict[str, str]:
    """Weights of the old version -> those of the new one that are the same but for their rounding to a format."""
    before, after = (set(_names(side)) for side in (region.before, region.after))
    old, new = region.before.snapshot.weights, region.after.snapshot.weights
    pairs: dict[str, str] = {}
    for name in sorted((after - before) & new.keys()):
        source = unrounded(new[name])
        if source is not new[name]:
            pairs |= {o: name for o in sorted(before & old.keys()) if same_numbers(old[o], source)}
    return pairs
