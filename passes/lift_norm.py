"""Finds every RMS normalisation, however it is spelled, and replaces it by one op.

Before:  c = to(x, f32); v = mean(pow(c, 2), [-1], True); n = to(mul(c, rsqrt(add(v, eps))), bf16); y = mul(w, n)
After:   y = moec::rms_norm(x, w, eps, "before_weight", 0.0, False)
Leaves alone: aten.layer_norm (ATen has one kernel for it); a root that is no part of a norm; a region that reads two
         moving values; a region that no form of the op equals on probes.
Needs:   meta["val"].  Gives: norms as moec::rms_norm, dead arithmetic removed.
Source:  facts of 33 families: the weight before or after the rounding, 1 + w, no weight, mean subtracted.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import moec.passes.ir.ops  # noqa: F401  (registers torch.ops.moec)
from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import argument, call, calls, is_call, remove_dead, replace, symbolic
from moec.passes.infra.verify import SCALES, Cut, agreement, constant_nodes, kind_of, random_like, run, single_entries

aten = torch.ops.aten
ROOTS = (aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar, aten.rms_norm.default)
LAYER_NORMS = (aten.layer_norm.default, aten.native_layer_norm.default)
FOLLOWED = (aten.mul.Tensor, aten.div.Tensor, aten.reciprocal.default, aten.to.dtype, aten.type_as.default)


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """The constants of moec::rms_norm; see there."""

    eps: float
    cast: str
    offset: float
    centre: bool

    def __str__(self) -> str:
        return f"eps {self.eps:g}, {self.cast}, offset {self.offset:g}" + (", centred" if self.centre else "")


class LiftNorm:
    """RMS norms become moec::rms_norm."""

    name = "lift-norm"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        constants = constant_nodes(gm)
        known: dict[Hashable, NormSpec | None] = {}
        entries: list[Match | NoMatch] = [
            NoMatch("layer norm with a bias: aten.layer_norm is one kernel already", n.name, layer_of(n))
            for n in calls(gm, *LAYER_NORMS)
        ]
        for root in calls(gm, *ROOTS):
            if root.target is aten.pow.Tensor_Scalar and root.args[1] != -0.5:
                continue
            entries.append(_lift(gm, root, constants, known))
        changed = any(isinstance(e, Match) for e in entries)
        if changed:
            remove_dead(gm)
        return PassResult(gm, changed, Ledger.of(entries))


def _lift(
    gm: GraphModule, root: Node, constants: Collection[Node], known: dict[Hashable, NormSpec | None]
) -> Match | NoMatch:
    reason = "no region around it reads one value and ends in one"
    for output in reversed(list(_outputs(root))):
        for cut in itertools.islice(single_entries(output, constants), 6):
            if root not in cut.nodes or not _alike(cut.entry.meta["val"], output.meta["val"]):
                continue
            if len(cut.weights) > 1 or cut.leaves:
                reason = f"the region from {cut.entry.name} to {output.name} reads more than one weight"
                continue
            key = kind_of(cut)
            if key not in known:
                known[key] = recognise(cut, root)
            spec = known[key]
            if spec is not None:
                return _rewrite(gm, cut, spec)
            reason = f"the region from {cut.entry.name} to {output.name} equals no form of moec::rms_norm on probes"
    return NoMatch(reason, root.name, layer_of(root))


def _alike(entry: Any, output: Tensor) -> bool:
    """Whether a norm may lead from one to the other. entry: a tensor, or the several of a split."""
    return (
        isinstance(entry, Tensor)
        and entry.dtype == output.dtype
        and [symbolic(s) for s in entry.shape[-1:]] == [symbolic(s) for s in output.shape[-1:]]
    )


def _outputs(root: Node) -> Iterator[Node]:
    """Where the norm may end: the root and, while there is one reader only, the products and casts after it."""
    node = root
    while True:
        yield node
        if len(node.users) != 1:
            return
        (node,) = node.users
        if not is_call(node, *FOLLOWED):
            return


def recognise(cut: Cut, root: Node) -> NormSpec | None:
    """The form of moec::rms_norm that a region equals on probes; an exact one before a close one. None: none does."""
    best: tuple[int, NormSpec] | None = None
    casts, offsets = (("before_weight", "after_weight"), (0.0, 1.0)) if cut.weights else (("before_weight",), (0.0,))
    centre = any(is_call(n, aten.sub.Tensor) for n in cut.nodes)
    for cast, offset in itertools.product(casts, offsets):
        spec = NormSpec(_eps(root), cast, offset, centre)
        grade = _grade(cut, spec)
        if grade is not None and (best is None or grade < best[0]):
            best = grade, spec
    return None if best is None else best[1]


def _eps(root: Node) -> float:
    if root.target is aten.rms_norm.default:
        eps = argument(root, 3, "eps")
        return torch.finfo(root.meta["val"].dtype).eps if eps is None else eps
    added = root.args[0]
    if is_call(added, aten.add.Tensor) and isinstance(added.args[1], (int, float)):
        return float(added.args[1])
    return 0.0


def _grade(cut: Cut, spec: NormSpec) -> int | None:
    """The worst agreement over the probes: random at several scales, both signs, zeros."""
    generator = torch.Generator().manual_seed(0)
    worst = 0
    for scale in SCALES:
        x = random_like(cut.entry, generator, scale)
        weights = {n: random_like(n, generator) for n in cut.weights}
        expected = run(cut.nodes, {cut.entry: x, **weights}, cut.output)
        got = torch.ops.moec.rms_norm(x, next(iter(weights.values()), None), *dataclasses.astuple(spec))
        grade = agreement(expected, got)
        if grade is None:
            return None
        worst = max(worst, grade)
    return worst


def _rewrite(gm: GraphModule, cut: Cut, spec: NormSpec) -> Match:
    weight = cut.weights[0] if cut.weights else None
    output = cut.output
    name, layer = output.name, layer_of(output)
    with gm.graph.inserting_before(output):
        args = (cut.entry, weight, *dataclasses.astuple(spec))
        replace(output, call(gm.graph, torch.ops.moec.rms_norm.default, args, like=output))
    return Match(name, layer, str(spec))
