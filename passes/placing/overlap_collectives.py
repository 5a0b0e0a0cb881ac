"""Lets collectives run beside work: tokens travel in chunks, and work that needs no result of a collective comes first.

Before:  r = all_to_all(rows); s = wait(r); y = experts(s); b = all_to_all(y); z = wait(b); g = gated_mlp(x)
After:   r0 = all_to_all(rows0); r1 = all_to_all(rows1); g = gated_mlp(x); s0 = wait(r0); y0 = experts(s0)
         b0 = all_to_all(y0); s1 = wait(r1); y1 = experts(s1); ..   (chunk 1 travels while chunk 0 is computed)
Leaves alone: an exchange with an operation that looks at several rows at once (a scale of the whole batch, a capacity):
         chunks would change its result; a wait that the next value reads. Nothing moves over another collective, so
         that their order stays the one order of all ranks.
Needs:   insert-collectives. options["overlap-collectives"]: chunks of an exchange, the same on every rank; 1 if absent.
Gives:   the same values, bit for bit where a product does not depend on how many rows it is given.
Source:  chunked all-to-all of Tutel (arXiv 2206.03382) and FasterMoE; shared experts beside dispatch in Megatron-Core.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import calls, is_call
from moec.passes.placing.collectives import ISSUED, WAIT, c10d
from moec.passes.placing.exchange import Exchange, insert_exchange

aten, moec = torch.ops.aten, torch.ops.moec
ROW_BY_ROW = (moec.experts.default, aten.slice.Tensor, aten.to.dtype, aten.take.default)
"""What may stand between the arrival of rows and their way back when an exchange is cut in chunks."""
WORK = (moec.gated_mlp.default, moec.experts.default, aten.linear.default)
"""What is worth moving before a wait, with all that it needs."""
SHARED = (moec.gated_mlp.default,)
"""Shared experts: they may stand behind weights that belong to no layer."""


class OverlapCollectives:
    """See the module."""

    name = "overlap-collectives"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        chunks = int(context.options.get(self.name, 1))
        entries: list[Match | NoMatch] = []
        for total in [n for n in gm.graph.nodes if "exchanged_by" in n.meta] if chunks > 1 else []:
            reason = _mixes_rows(gm, total)
            name, layer = total.name, layer_of(total)
            if reason:
                entries.append(NoMatch(reason, name, layer))
            else:
                entries.append(Match(_in_chunks(gm, total, chunks).name, layer, f"{chunks} chunks of tokens"))
        held = set[Node]()
        for wait in list(calls(gm, WAIT)):
            back = _hold_back(wait, held)
            held.update(back)
            passed = [n.name for n in (*back, *_hoist(wait, WORK, (layer_of(wait),)), *_sink(wait))]
            if passed:
                entries.append(Match(wait.name, layer_of(wait), f"runs beside {', '.join(passed)}"))
            else:
                entries.append(NoMatch("what follows reads it at once", wait.name, layer_of(wait)))
        ledger = Ledger.of(entries)
        return PassResult(gm, bool(ledger.matched), ledger)


def _mixes_rows(gm: GraphModule, total: Node) -> str:
    """Why an exchange must not be cut in chunks, "" where it may."""
    region = [n for n in gm.graph.nodes if n.meta.get("exchange") == total.name]
    exchanged = [n for n in region if is_call(n, c10d.all_to_all_single.default)]
    arrived = [n for n in region if is_call(n, WAIT) and n.args[0] in exchanged]
    inside, todo = set[Node](), [u for n in arrived for u in n.users]
    while todo:
        node = todo.pop()
        if node in inside or node in exchanged or is_call(node, WAIT) or not _leads_back(node, exchanged):
            continue
        inside.add(node)
        todo += node.users
    for node in sorted(inside, key=lambda n: n.name):
        if not is_call(node, *ROW_BY_ROW) and not isinstance(node.meta["val"], list):
            return (
                f"{node.name} ({node.target}) may look at several rows at once, so that chunks would change its result"
            )
    return ""


def _leads_back(node: Node, exchanged: list[Node]) -> bool:
    """Whether an all-to-all follows from a value."""
    seen, todo = set[Node](), [node]
    while todo:
        at = todo.pop()
        if at in exchanged:
            return True
        if at not in seen:
            seen.add(at)
            todo += at.users
    return False


def _in_chunks(gm: GraphModule, total: Node, count: int) -> Node:
    """Writes an exchange anew in chunks: every count-th of the tokens each."""
    exchange: Exchange = total.meta["exchanged_by"]
    users = list(total.users)
    anew = insert_exchange(gm, [exchange.chunk(i, count) for i in range(count)], total.next, total)
    for user in users:
        user.replace_input_with(total, anew)
    for node in reversed([n for n in gm.graph.nodes if n.meta.get("exchange") == total.name]):
        gm.graph.erase_node(node)
    return anew


def _hold_back(wait: Node, held: set[Node]) -> list[Node]:
    """Moves shared experts to just before this wait for rows: those in front of the exchange, which would else keep the
    tokens from leaving, and those behind it that need nothing of it."""
    issued = wait.args[0]
    if not is_call(issued, c10d.all_to_all_single.default) or isinstance(issued.args[1], list | tuple):
        return []
    found, at = [], issued.prev
    while at.op != "placeholder" and layer_of(at) in (layer_of(wait), None):
        if is_call(at, moec.gated_mlp.default) and at not in held and all(wait < u for u in at.users):
            found.append(at)
        at = at.prev
    for node in found:
        wait.prepend(node)
    return found + _hoist(wait, SHARED, (layer_of(wait), None))


def _hoist(wait: Node, work: tuple[Any, ...], layers: tuple[int | None, ...]) -> list[Node]:
    """Moves work of these layers that needs neither the wait's value nor a later collective's before the wait. Of other
    layers, None among them, the first node ends the search."""
    if any(isinstance(u.meta.get("val"), list) for u in wait.users):  # numbers of rows: their exchange is over at once
        return []
    later, independent, at = {wait}, [], wait.next
    while at.op != "output" and layer_of(at) in layers:
        if is_call(at, *ISSUED, WAIT) or any(p in later for p in at.all_input_nodes):
            later.add(at)
        elif at.op in ("call_function", "get_attr"):
            independent.append(at)
        at = at.next
    wanted: set[Node] = set()
    for node in reversed(independent):
        if is_call(node, *work) or any(u in wanted for u in node.users):
            wanted.add(node)
    moved = [n for n in independent if n in wanted]
    for node in moved:
        wait.prepend(node)
    return [n for n in moved if is_call(n, *work)]


def _sink(wait: Node) -> list[Node]:
    """Moves a wait before its first reader or the next collective; returns the calls that it passed."""
    passed, at = [], wait.next
    while at.op != "output" and at not in wait.users and not is_call(at, *ISSUED):
        if at.op == "call_function" and not is_call(at, WAIT):
            passed.append(at)
        at = at.next
    if passed:
        at.prepend(wait)
    return passed
