"""Where single experts' tensors lie: a list of tensors, an axis of a stack, or a stretch of a long axis."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor

from moec.passes.ir.weights import Weight, reshape, slice_, source, stack

MAX_EXPERTS = 1024
MAX_GROUP = 64  # experts in a group, where the two are axes of one tensor


@dataclasses.dataclass(frozen=True)
class Slices:
    """One tensor per expert.

    kind: "list" (names has one per expert), "axis" (index on an axis of size E), "pair" (index on the first two axes,
        a*b = E), "outer" (axis E*n, expert by expert), "inner" (axis n*E, experts in turn).
    kept: which of the slices are routed experts, in order.
    """

    names: tuple[str, ...]
    kind: Literal["list", "axis", "pair", "outer", "inner"]
    axis: int
    kept: tuple[int, ...]
    total: int

    @property
    def key(self) -> str:
        """A name for messages and certificates: "experts.*.w1.weight", "w_in[axis 0]"."""
        name = self.names[0] if self.kind != "list" else re.sub(r"\d+", "*", self.names[0])
        return name if self.kind == "list" else f"{name}[{self.kind} {self.axis}]"

    def view(self, leaves: Mapping[str, Tensor], e: int) -> Tensor:
        """Expert e's tensor, a view that can be written."""
        i = self.kept[e]
        if self.kind == "list":
            return leaves[self.names[i]].data
        tensor = leaves[self.names[0]].data
        if self.kind == "axis":
            return tensor.select(self.axis, i)
        if self.kind == "pair":
            return tensor[i // tensor.shape[1], i % tensor.shape[1]]
        n = tensor.shape[self.axis] // self.total
        if self.kind == "outer":
            return tensor.unflatten(self.axis, (self.total, n)).select(self.axis, i)
        return tensor.unflatten(self.axis, (n, self.total)).select(self.axis + 1, i)

    def recipe(self, tensors: Mapping[str, Tensor], e: int) -> Weight:
        """Expert e's tensor as a recipe."""
        i = self.kept[e]
        whole = _source(tensors, self.names[i if self.kind == "list" else 0])
        if self.kind == "list":
            return whole
        if self.kind == "pair":
            whole = reshape(whole, (self.total, *whole.shape[2:]))
        shape = list(whole.shape)
        if self.kind in ("axis", "pair"):
            part = slice_(whole, self.axis, i, i + 1)
            return reshape(part, tuple(shape[: self.axis] + shape[self.axis + 1 :]))
        n = shape[self.axis] // self.total
        if self.kind == "outer":
            return slice_(whole, self.axis, i * n, (i + 1) * n)
        return slice_(whole, self.axis, i, shape[self.axis], self.total)

    def stacked(self, tensors: Mapping[str, Tensor], experts: Iterable[int] | None = None) -> Weight:
        """[E, ..] of the given experts (all), as plain as it can be."""
        if experts is None:
            whole = _source(tensors, self.names[0])
            if self.kind != "list" and self.axis == 0 and self.kept == tuple(range(self.total)):
                if self.kind == "axis":
                    return whole
                if self.kind == "pair":
                    return reshape(whole, (self.total, *whole.shape[2:]))
                if self.kind == "outer":
                    return reshape(whole, (self.total, whole.shape[0] // self.total, *whole.shape[1:]))
        return stack([self.recipe(tensors, e) for e in (range(len(self.kept)) if experts is None else experts)])

    def keep(self, kept: list[int]) -> Slices:
        """Only the experts of those numbers; they count anew from 0."""
        return dataclasses.replace(self, kept=tuple(self.kept[e] for e in kept))


def _source(tensors: Mapping[str, Tensor], name: str) -> Weight:
    return source(name, tuple(tensors[name].shape), tensors[name].dtype)


def options(leaves: Mapping[str, Tensor], sizes: Iterable[int], skip: frozenset[str]) -> dict[int, list[Slices]]:
    """All ways to slice float tensors into E parts, by E. sizes: further E to try.  skip: names that are no experts."""
    usable = {n: t for n, t in leaves.items() if t.is_floating_point() and n not in skip}
    found: dict[int, list[Slices]] = {}
    for names in lists(usable):
        count = len(names)
        found.setdefault(count, []).append(Slices(names, "list", 0, tuple(range(count)), count))
    stacks = {t.shape[0] for t in leaves.values() if t.dim() >= 3}
    stacks |= {t.shape[0] * t.shape[1] for t in leaves.values() if t.dim() >= 3 and t.shape[1] <= MAX_GROUP}
    for count in sorted({*found, *sizes, *stacks}):
        if not 2 <= count <= MAX_EXPERTS:
            continue
        for name, tensor in usable.items():
            if tensor.dim() >= 3 and tensor.shape[0] * tensor.shape[1] == count and 1 not in tensor.shape[:2]:
                found.setdefault(count, []).append(Slices((name,), "pair", 0, tuple(range(count)), count))
            matrix = tensor.dim() <= 2 or set(tensor.shape[2:]) == {1}
            for axis, size in enumerate(tensor.shape):
                every = tuple(range(count))
                if size == count:
                    found.setdefault(count, []).append(Slices((name,), "axis", axis, every, count))
                elif size % count == 0 and matrix:
                    found.setdefault(count, []).append(Slices((name,), "outer", axis, every, count))
                    found[count].append(Slices((name,), "inner", axis, every, count))
    return found


def lists(leaves: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Names of equal shapes that differ in one or two numbers, in order of those, or in one word, as they come."""
    groups: dict[str, dict[tuple[int, ...], str]] = {}
    words: dict[str, dict[str, str]] = {}
    for name in leaves:
        parts = name.split(".")
        for i, word in enumerate(parts):
            if not word.isdigit():
                words.setdefault(".".join([*parts[:i], "*", *parts[i + 1 :]]), {})[word] = name
        numbers = list(re.finditer(r"\d+", name))[:4]
        for few in (1, 2):
            for chosen in itertools.combinations(numbers, few):
                key = name
                for m in reversed(chosen):
                    key = key[: m.start()] + "*" + key[m.end() :]
                groups.setdefault(key, {})[tuple(int(m.group()) for m in chosen)] = name
    ordered = [tuple(g[i] for i in sorted(g)) for g in groups.values()] + [tuple(g.values()) for g in words.values()]
    alike = [names for names in ordered if len(names) >= 2 and len({leaves[n].shape for n in names}) == 1]
    return list(dict.fromkeys(alike))
