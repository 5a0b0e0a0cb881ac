"""Runs passes in order: checks the graph after each, gathers ledgers and evidence, writes dumps through a callback."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from moec.passes.infra.base import Ledger, Pass, PassContext, PassResult
from moec.passes.infra.errors import PassError, in_one_line
from moec.passes.infra.evidence import Evidence, gather
from moec.passes.infra.rewrite import differing, refresh_values
from moec.passes.infra.snapshot import Snapshot, changed_names, take
from moec.passes.ir.text import graph_text

MODES = ("off", "sampled", "full")
Dump = Callable[[str, str], None]


@dataclasses.dataclass(frozen=True)
class PipelineResult:
    """graph: after all passes. ledgers: by pass name, in order. evidence: one record per region and probe."""

    graph: torch.fx.GraphModule
    ledgers: dict[str, Ledger]
    evidence: tuple[Evidence, ...]


def run_passes(
    gm: torch.fx.GraphModule,
    passes: Sequence[Pass],
    context: PassContext,
    *,
    evidence: str = "off",
    dump: Dump | None = None,
) -> PipelineResult:
    """Runs `passes` over `gm`, in place.

    Args:
        evidence: "off"; "sampled": one region of each kind; "full": every changed region.
        dump: gets (title, text) before the first pass and after each; titles are numbered file names.
    Raises: PassError: a pass failed, left a graph that does not hold together, or changed what it computes; the message
        names the pass and those that ran before it.
    """
    if evidence not in MODES:
        raise ValueError(f"evidence is {evidence!r}; known: {', '.join(MODES)}")
    ledgers: dict[str, Ledger] = {}
    records: list[Evidence] = []
    if dump:
        dump("00-captured", graph_text(gm))
    now = take(gm)
    for number, one in enumerate(passes, 1):
        result = _run_one(one, gm, context, list(ledgers))
        gm = result.graph
        earlier = ledgers.get(one.name, Ledger())
        ledgers[one.name] = Ledger(earlier.matched + result.ledger.matched, result.ledger.refused)
        _check(one.name, gm, now, list(ledgers))
        before, now = now, take(gm)
        if not result.changed and changed_names(before, now):
            raise PassError(f"pass {one.name} says that it changed nothing, and did")
        if result.changed and evidence != "off":
            records += gather(one.name, before, now, context.read, every=evidence == "full")
        if dump:
            dump(f"{number:02}-{one.name}", graph_text(gm))
    refresh_values(gm)
    gm.recompile()
    return PipelineResult(gm, ledgers, tuple(records))


def _run_one(one: Pass, gm: torch.fx.GraphModule, context: PassContext, earlier: list[str]) -> PassResult:
    """Runs a pass; any exception inside it is a defect of that pass, so the message says which."""
    try:
        return one.run(gm, context)
    except Exception as error:
        told = str(error) if isinstance(error, PassError) else in_one_line(error)
        raise PassError(f"pass {one.name}: {told} (after {', '.join(earlier) or 'no other pass'})") from error


def _check(name: str, gm: torch.fx.GraphModule, before: Snapshot, ran: list[str]) -> None:
    """The graph is well formed, and values that kept their name kept shape and dtype."""
    history = f"passes so far: {', '.join(ran)}"
    try:
        gm.graph.lint()
    except Exception as error:
        raise PassError(f"pass {name} left a malformed graph: {in_one_line(error)} ({history})") from error
    earlier = before.nodes
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        if "val" not in node.meta:
            raise PassError(f"pass {name}: new node {node.name} has no meta['val'] ({history})")
        old = earlier.get(node.name)
        if old is None:
            continue
        reason = differing(old.meta["val"], node.meta["val"])
        if reason:
            where = f"layer {node.meta.get('layer')}, {node.name}"
            raise PassError(f"pass {name}: {where}: {reason} ({history})")
