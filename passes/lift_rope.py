"""Finds every rotary position embedding, however it is spelled, and replaces it by one op on half-width tables.

Before:  y = add(mul(x, cos), mul(cat([neg(x2), x1], -1), sin))          x [1, Q, T, D]; cos, sin [1, 1, T, D]
After:   c = cos(angles); s = sin(angles); y = moec::rope(x, c, s, "half", D, "input")        x [T, Q, D]; c, s [T, D/2]
Leaves alone: a reader of a table that is no rotation on probes; tables that are no chain of elementwise operations on
         angles; batches other than 1.
Needs:   meta["val"].  Gives: rotations as moec::rope, dead arithmetic removed.
Source:  facts of 33 families: rotate-half, interleaved (in place and de-interleaving), partial, in float32, complex.
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
from moec.passes.infra.rewrite import call, in_order, is_call, remove_dead, replace, symbolic
from moec.passes.infra.verify import SCALES, Cut, agreement, constant_nodes, kind_of, random_like, run, single_entries
from moec.passes.lifting.rotation import Step, Table, nodes_between, table_of, table_space

aten = torch.ops.aten
FOLLOWED = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.cat.default,
    aten.stack.default,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.view_as_real.default,
    aten.to.dtype,
    aten.type_as.default,
)
PAIRINGS = ("half", "interleaved", "deinterleaved")
REACH = 12  # nodes after the first product with a table


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a region holds [T, Q, D]: the steps from its own layout to that one, and back."""

    to_rows: tuple[Step, ...]
    from_rows: tuple[Step, ...]


SWAP = Step(aten.transpose.int, (0, 1))
LAYOUTS = {
    "1TQD": Layout((Step(aten.select.int, (0, 0)),), (Step(aten.unsqueeze.default, (0,)),)),
    "1QTD": Layout((Step(aten.select.int, (0, 0)), SWAP), (SWAP, Step(aten.unsqueeze.default, (0,)))),
    "TQD": Layout((), ()),
    "QTD": Layout((SWAP,), (SWAP,)),
    "TD": Layout((Step(aten.unsqueeze.default, (1,)),), (Step(aten.select.int, (1, 0)),)),
}


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """pairing, rotary_dim, compute_dtype: constants of moec::rope; layout: a key of LAYOUTS."""

    pairing: str
    rotary_dim: int
    compute_dtype: str
    layout: str

    def __str__(self) -> str:
        return f"{self.pairing}, {self.rotary_dim} columns, computed in {self.compute_dtype}, from {self.layout}"


@dataclasses.dataclass(frozen=True)
class Rotation:
    """A cut with its tables, cosines first."""

    cut: Cut
    tables: tuple[Table, ...]


class LiftRope:
    """Rotary embeddings become moec::rope."""

    name = "lift-rope"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        constants = constant_nodes(gm)
        tables = table_space(gm, constants)
        known: dict[Hashable, RopeSpec | None] = {}
        emitted: dict[Any, Node] = {}
        done: set[Node] = set()
        entries: list[Match | NoMatch] = []
        for node in _readers(tables):
            if node in done:
                continue
            found = _find(node, constants, tables, known)
            if isinstance(found, NoMatch):
                entries.append(found)
                continue
            rotation, spec = found
            done.update(rotation.cut.nodes)
            entries.append(_rewrite(gm, rotation, spec, emitted))
        changed = any(isinstance(e, Match) for e in entries)
        if changed:
            remove_dead(gm)
        return PassResult(gm, changed, Ledger.of(entries))


def _readers(tables: Collection[Node]) -> list[Node]:
    """The calls that combine a table with something else, in order; the ones lifted before are not sites."""
    readers = {u for t in tables for u in t.users if u.op == "call_function" and u not in tables}
    return in_order(n for n in readers if n.target is not torch.ops.moec.rope.default)


def _find(
    reader: Node, constants: Collection[Node], tables: Collection[Node], known: dict[Hashable, RopeSpec | None]
) -> tuple[Rotation, RopeSpec] | NoMatch:
    """The largest region through a reader of tables that is a rotation."""
    reason = "no region around it reads one value beside the tables and gives one like it"
    for output in reversed(_outputs(reader, tables)):
        for cut in itertools.islice(single_entries(output, constants, tables.__contains__), 6):
            if reader not in cut.nodes or cut.weights or not _alike(cut.entry, output):
                continue
            rotation = _with_tables(cut, tables)
            if isinstance(rotation, str):
                reason = rotation
                continue
            key = (kind_of(cut), rotation.tables)
            if key not in known:
                known[key] = recognise(rotation)
            spec = known[key]
            if spec is not None:
                return rotation, spec
            reason = f"the region from {cut.entry.name} to {output.name} equals no form of moec::rope on probes"
    return NoMatch(reason, reader.name, layer_of(reader))


def _outputs(reader: Node, tables: Collection[Node]) -> list[Node]:
    """Where the rotation may end: the reader and what follows it, in order."""
    found, todo = {reader}, [reader]
    while todo and len(found) < REACH:
        for user in todo.pop(0).users:
            product = is_call(user, aten.mul.Tensor) and any(n in tables for n in user.all_input_nodes)
            if user not in found and (product or is_call(user, *FOLLOWED)):
                found.add(user)
                todo.append(user)
    return in_order(found)


def _alike(a: Node, b: Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return (
        isinstance(x, Tensor)
        and isinstance(y, Tensor)
        and x.dtype == y.dtype
        and [symbolic(n) for n in x.shape] == [symbolic(n) for n in y.shape]
    )


def _with_tables(cut: Cut, tables: Collection[Node]) -> Rotation | str:
    """Reads the half-width tables behind the cut's leaves, or says why they cannot be read."""
    found: dict[Table, None] = {}
    for leaf in cut.leaves:
        if leaf not in tables:
            continue
        table = table_of(leaf)
        if isinstance(table, str):
            return table
        found.update(dict.fromkeys(table.halves()))
    by_function = {t.function: t for t in found}
    if len(found) != 2 or set(by_function) != {"cos", "sin"} or len({t.angles for t in found}) != 1:
        return f"the region that ends in {cut.output.name} does not read one table of cosines and one of sines"
    return Rotation(cut, (by_function["cos"], by_function["sin"]))


def recognise(rotation: Rotation) -> RopeSpec | None:
    """The form of moec::rope that a region equals on probes; an exact one before a close one. None: none does."""
    cut, (cos, _) = rotation.cut, rotation.tables
    columns = 2 * int(cos.angles.meta["val"].shape[-1])
    if columns > int(cut.entry.meta["val"].shape[-1]):
        return None
    best: tuple[int, RopeSpec] | None = None
    for layout, pairing, dtype in itertools.product(_layouts(cut.entry, cos.angles), PAIRINGS, ("input", "float32")):
        spec = RopeSpec(pairing, columns, dtype, layout)
        grade = _grade(rotation, spec)
        if grade is not None and (best is None or grade < best[0]):
            best = grade, spec
    return None if best is None else best[1]


def _layouts(entry: Node, angles: Node) -> Iterator[str]:
    """The layouts that a value's shape allows; T is where the angles have it."""
    tokens = symbolic(angles.meta["val"].shape[-2])
    shape = [symbolic(n) for n in entry.meta["val"].shape]
    for name in LAYOUTS:
        if len(name) == len(shape) and shape[name.index("T")] == tokens and (name[0] != "1" or shape[0] == 1):
            yield name


def _grade(rotation: Rotation, spec: RopeSpec) -> int | None:
    """The worst agreement over the probes: values at several scales, angles over many turns."""
    cut, (cos, sin) = rotation.cut, rotation.tables
    angles = cos.angles
    generator = torch.Generator().manual_seed(0)
    inside = [*nodes_between(angles, [n for n in cut.leaves if isinstance(n.meta["val"], Tensor)]), *cut.nodes]
    layout, worst = LAYOUTS[spec.layout], 0
    for scale in SCALES:
        x, turns = random_like(cut.entry, generator, scale), random_like(angles, generator, 50.0)
        expected = run(inside, {cut.entry: x, angles: turns}, cut.output)
        rows = turns.view(turns.shape[-2:])
        got = torch.ops.moec.rope(
            _apply(layout.to_rows, x),
            cos.value(rows),
            sin.value(rows),
            spec.pairing,
            spec.rotary_dim,
            spec.compute_dtype,
        )
        grade = agreement(expected, _apply(layout.from_rows, got))
        if grade is None:
            return None
        worst = max(worst, grade)
    return worst


def _apply(steps: tuple[Step, ...], x: Tensor) -> Tensor:
    for step in steps:
        x = step.target(x, *step.args)
    return x


def _rewrite(gm: GraphModule, rotation: Rotation, spec: RopeSpec, emitted: dict[Any, Node]) -> Match:
    cos, sin = (t.emit(gm.graph, emitted) for t in rotation.tables)
    output, layout = rotation.cut.output, LAYOUTS[spec.layout]
    name, layer = output.name, layer_of(output)
    with gm.graph.inserting_before(output):
        x = rotation.cut.entry
        for step in layout.to_rows:
            x = call(gm.graph, step.target, (x, *step.args), like=output)
        args = (x, cos, sin, spec.pairing, spec.rotary_dim, spec.compute_dtype)
        x = call(gm.graph, torch.ops.moec.rope.default, args, like=output)
        for step in layout.from_rows:
            x = call(gm.graph, step.target, (x, *step.args), like=output)
        replace(output, x)
    return Match(name, layer, str(spec))
