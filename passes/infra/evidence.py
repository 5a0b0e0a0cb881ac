"""Evidence that a pass kept the meaning: what changed is found from the two graphs alone, and evaluated both ways.

The graphs are lined up by node name, target and arguments. Changed nodes that touch form a region; its outputs are its
values that unchanged nodes read. Both versions run on the same probe inputs with the real weights of that layer; where
the new version alone rounds a weight to a format, the old one gets the rounded numbers too, so that rounding hides
nothing. Whatever a pass claims in its ledger is not consulted. Both versions and all probes go over a layer's experts
together, one expert at a time (stream.py).
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moec.passes.infra.compare import compare, looked_at, open_rows
from moec.passes.infra.errors import PassError, in_one_line
from moec.passes.infra.probes import PROBES, Probe, make, symbol_values
from moec.passes.infra.region_weights import RegionWeights
from moec.passes.infra.regions import ChangedRegion, Side, changed_regions, kind_of_change
from moec.passes.infra.snapshot import Snapshot, named
from moec.passes.infra.stream import Run, complete
from moec.passes.ir.evaluate import steps
from moec.passes.ir.formats import FormatError
from moec.passes.ir.weights import Read

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


@torch.no_grad()
def gather(pass_name: str, before: Snapshot, after: Snapshot, read: Read | None, *, every: bool) -> list[Evidence]:
    """Evaluates what a pass changed. every: all regions, else one of each kind.

    Raises: PassError: a region differs, or runs no more; the message names pass, layer and site.
    """
    _check_ends(pass_name, before, after)
    kinds: dict[str, list[ChangedRegion]] = {}
    for region in changed_regions(before, after):
        kinds.setdefault(kind_of_change(region), []).append(region)
    records = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*degrees of freedom is <= 0")  # torch's std of an empty batch
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
    return node.name if node.op == "placeholder" else str(named(node.args))


def _evaluate(pass_name: str, region: ChangedRegion, read: Read | None, regions: int) -> list[Evidence]:
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
    given = {probe.name: _inputs(region, probe) for probe in PROBES}
    firsts, seconds = _run_both(where, region, RegionWeights(region, read), given)
    records = []
    for probe in PROBES:
        first, undetermined = _before(region, firsts[probe.name])
        if first is None:
            records.append(record(probe=probe.name, max_rel_err=None, note=undetermined))
            continue
        second = _after(where, probe, region, seconds[probe.name])
        compared = compare(first, second, _routings(region), undetermined)
        if not compared.error <= tolerance:
            raise PassError(
                f"{where}: probe {probe.name!r}: {compared.what} differs by {compared.error:.2e} relative, "
                f"tolerance {tolerance:.0e}; this pass changed the meaning (weights: {weights})"
            )
        records.append(record(probe=probe.name, max_rel_err=compared.error, note=compared.note))
    return records


@dataclasses.dataclass(frozen=True)
class _Ran:
    """One version under one probe. inputs: as it left them."""

    run: Run
    inputs: dict[str, Any]


def _run_both(
    where: str, region: ChangedRegion, weights: RegionWeights, given: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, _Ran], dict[str, _Ran]]:
    """Both versions on all probes; at once where that needs no more memory, so that each weight is made once.

    Raises: PassError: a weight cannot be rounded to its format.
    """
    outputs = set(region.outputs)
    firsts = _start(region.before, weights.before, given, outputs | looked_at(region.before.nodes))
    if not weights.alike:
        _complete(where, firsts)
        weights.keep_after()
    seconds = _start(region.after, weights.after, given, outputs)
    _complete(where, [*firsts, *seconds])
    return dict(zip(given, firsts, strict=True)), dict(zip(given, seconds, strict=True))


def _start(
    side: Side, constant: Callable[[str], Any], given: Mapping[str, Mapping[str, Any]], keep: set[str]
) -> list[_Ran]:
    started = []
    for values in given.values():
        mine = {n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()}  # a run may write to them
        started.append(_Ran(Run(steps(side.nodes, mine, constant, keep - mine.keys())), mine))
    return started


def _complete(where: str, started: Sequence[_Ran]) -> None:
    runs = [one.run for one in started]
    complete(runs)
    for run in runs:
        if isinstance(run.error, FormatError):
            raise PassError(f"{where}: {run.error}") from run.error


def _dtypes(region: ChangedRegion) -> set[torch.dtype]:
    """The floating dtypes inside a region: the coarsest decides the tolerance."""
    nodes = (*region.before.nodes, *region.after.nodes)
    found = {v.dtype for n in nodes if isinstance(v := n.meta.get("val"), Tensor) and v.dtype.is_floating_point}
    return found or {torch.float32}


def _inputs(region: ChangedRegion, probe: Probe) -> dict[str, Any]:
    values = symbol_values(region.after.snapshot.graph, probe.tokens)
    users: dict[str, list[Node]] = {name: [] for name in region.inputs}
    for user in (*region.before.nodes, *region.after.nodes):
        for p in user.all_input_nodes:
            if p.name in users:
                users[p.name].append(user)
    nodes = region.before.snapshot.nodes | region.after.snapshot.nodes
    return {name: make(nodes[name], probe, values, users[name]) for name in region.inputs}


def _before(region: ChangedRegion, ran: _Ran) -> tuple[dict[str, Any] | None, Any]:
    """Outputs and which rows a tie leaves open; (None, why) where the captured graph itself cannot run this probe."""
    if ran.run.values is None:
        assert ran.run.error is not None
        return None, f"the graph before does not run this probe: {in_one_line(ran.run.error)}"
    values = ran.run.values | ran.inputs
    first = values[region.outputs[0]]
    rows = first.shape[0] if isinstance(first, Tensor) and first.dim() else 0
    return _observed(region, values, ran.inputs), open_rows(region.before.nodes, values, rows)


def _after(where: str, probe: Probe, region: ChangedRegion, ran: _Ran) -> dict[str, Any]:
    """Outputs. Raises: PassError: this version does not run."""
    if ran.run.values is None:
        error = ran.run.error
        assert error is not None
        raise PassError(f"{where}: probe {probe.name!r}: no longer runs: {in_one_line(error)}") from error
    return _observed(region, ran.run.values | ran.inputs, ran.inputs)


def _observed(region: ChangedRegion, values: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What can be seen of a region: its outputs, and its inputs as it left them (caches)."""
    return {n: values[n] for n in region.outputs} | {f"input {n}": v for n, v in inputs.items()}


def _routings(region: ChangedRegion) -> list[tuple[str, str]]:
    """Outputs that are the weights and the experts of one moec op: together they are a map, in no order."""
    names, pairs = set(region.outputs), []
    for node in region.after.snapshot.graph.find_nodes(op="call_function", target=torch.ops.moec.experts.default):
        weights, experts = (getattr(a, "name", None) for a in node.args[1:3])
        if weights in names and experts in names:
            pairs.append((weights, experts))
    return pairs
