"""Lets a collective run beside independent work: each wait moves down to its first reader.

Before:  r = all_reduce(y); s = wait_tensor(r); g = aten.linear(x, wg); z = aten.add(g, s)
After:   r = all_reduce(y); g = aten.linear(x, wg); s = wait_tensor(r); z = aten.add(g, s)
Leaves alone: a wait that the next value reads; nothing moves over another collective, so that their order stays the one
         order of all ranks.
Needs:   insert-collectives.  Gives: the same values; every operation is unchanged, only the order differs.
Source:  shared experts beside dispatch in Megatron-Core and DeepSeek-V3; the legality is dataflow.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import calls, is_call

c10d = torch.ops._c10d_functional


class OverlapCollectives:
    """See the module."""

    name = "overlap-collectives"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        entries: list[Match | NoMatch] = []
        for wait in list(calls(gm, c10d.wait_tensor.default)):
            passed = _sink(wait)
            if passed:
                entries.append(Match(wait.name, layer_of(wait), f"runs beside {', '.join(passed)}"))
            else:
                entries.append(NoMatch("what follows reads it at once", wait.name, layer_of(wait)))
        ledger = Ledger.of(entries)
        return PassResult(gm, bool(ledger.matched), ledger)


def _sink(wait: Node) -> list[str]:
    """Moves a wait before its first reader or the next collective; returns the names of the calls that it passed."""
    passed, at = [], wait.next
    while at.op != "output" and at not in wait.users and not is_call(at, c10d.all_reduce.default):
        if at.op == "call_function":
            passed.append(at.name)
        at = at.next
    if passed:
        at.prepend(wait)
    return passed
