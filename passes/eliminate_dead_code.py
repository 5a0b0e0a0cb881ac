"""Drops calls that nothing reads, and weights that no node names any more.

Before:  a = aten.relu(x); b = aten.neg(x); return b        weights: w (no reader)
After:   b = aten.neg(x); return b
Leaves alone: calls that write (the cache operations), inputs.
Needs:   no in-place ops beside the cache operations.  Gives: every call and every weight has a reader.
Source:  the usual backward sweep.
"""

from __future__ import annotations

from torch.fx import GraphModule

from moec.passes.infra.base import Ledger, PassContext, PassResult
from moec.passes.infra.rewrite import remove_dead
from moec.passes.ir.weights import weights_of


class EliminateDeadCode:
    """Dead calls and dead weights go."""

    name = "eliminate-dead-code"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        removed = remove_dead(gm)
        read = {str(n.target) for n in gm.graph.find_nodes(op="get_attr")}
        weights = weights_of(gm)
        for name in [n for n in weights if n not in read]:
            del weights[name]
            delattr(gm, name)
            removed += 1
        return PassResult(gm, removed > 0, Ledger())
