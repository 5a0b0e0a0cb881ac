"""Adds up partial sums: an all-reduce and its wait behind every value that ranks hold parts of.

Before:  y = aten.linear(a, wo_part)                                       meta["partial"]
After:   r = _c10d_functional.all_reduce(y, "sum", group); s = _c10d_functional.wait_tensor(r)
Leaves alone: a partial sum whose only reader adds another partial sum: the sum of both is reduced once.
Needs:   shard-weights.
Gives:   every value that is not between a cut weight and its wait is whole on every rank; all ranks run the same
         collectives in the same order.
Source:  Megatron-LM (arXiv 1909.08053), section 3.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import call, is_call

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
GROUP = "tp"


class InsertCollectives:
    """See the module."""

    name = "insert-collectives"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        entries: list[Match | NoMatch] = []
        for node in list(gm.graph.nodes):
            if not node.meta.get("partial"):
                continue
            later = _sum_of_parts(node)
            if later is not None:
                later.meta["partial"] = True
                entries.append(
                    NoMatch(
                        f"{later.name} adds it to another partial sum, which is reduced once", node.name, layer_of(node)
                    )
                )
            else:
                entries.append(_reduce(gm, node))
            node.meta.pop("partial")
        ledger = Ledger.of(entries)
        return PassResult(gm, bool(ledger.matched), ledger)


def _sum_of_parts(node: Node) -> Node | None:
    """The node's only reader where that adds it to another value that is partial and read nowhere else."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or not is_call(user, aten.add.Tensor) or user.kwargs:
        return None
    if user.meta.get("partial"):  # the other operand came first and handed its mark on
        return user
    other = next((a for a in user.args if isinstance(a, Node) and a is not node), None)
    return user if other is not None and other.meta.get("partial") and len(other.users) == 1 else None


def _reduce(gm: GraphModule, node: Node) -> Match:
    users = list(node.users)
    with gm.graph.inserting_after(node):
        reduced = call(gm.graph, c10d.all_reduce.default, (node, "sum", GROUP), like=node)
    with gm.graph.inserting_after(reduced):
        whole = call(gm.graph, c10d.wait_tensor.default, (reduced,), like=node)
    for user in users:
        user.replace_input_with(node, whole)
    return Match(reduced.name, layer_of(node), f"sum of {node.name} over the ranks")


def collective_order(gm: GraphModule) -> tuple[str, ...]:
    """The graph's collectives in order, with dtype and shape: must be the same text on every rank."""
    found = (n for n in gm.graph.nodes if is_call(n, c10d.all_reduce.default))
    return tuple(f"all_reduce sum {n.args[2]} {n.meta['val'].dtype} {list(n.meta['val'].shape)}" for n in found)
