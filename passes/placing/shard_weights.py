"""Cuts the weights of every chosen site to what this rank holds; what the site then gives is a partial sum.

Before:  q = aten.linear(x, wq); .. a = moec.cached_attention(q, k, v, ..); y = aten.linear(a, wo)
         e = moec.experts(x, weights, chosen, w_gate_up, w_down, ..)
After:   the same over rows of wq, wk, wv and columns of wo; experts over resident experts and their columns, with
         `chosen` mapped to local numbers (an expert that is not held maps beyond the last, which adds nothing); an
         output bias stays on one rank
Leaves alone: attention that is normalised over all heads at once (OLMoE, MiniMax-M2); attention whose queries, keys or
         values are not a product followed by views, norms of one head, rope, casts and scaling; experts with shared
         experts stacked behind them.
Needs:   choose-strategy.
Gives:   meta["partial"] on values that ranks must add up; caches of the rank's key/value heads.
Source:  tensor parallelism of Megatron-LM (arXiv 1909.08053), with any integer shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from moec.passes.infra.base import Ledger, Match, NoMatch, PassContext, PassResult, layer_of
from moec.passes.infra.rewrite import argument, call, calls, fake_value, is_call, remove_dead
from moec.passes.ir.activation import Activation
from moec.passes.ir.weights import Weight, concat, literal, slice_, weight_node, weights_of
from moec.passes.placement.rank_shares import LayerShare, Span

aten, moec = torch.ops.aten, torch.ops.moec
VIEWS = (aten.view.default, aten.reshape.default)
PER_HEAD = (moec.rope.default, moec.rms_norm.default, aten.to.dtype, aten.mul.Tensor, aten.clamp.default)
"""What may stand between a projection and the attention: each works on every head alone."""


class ShardWeights:
    """See the module."""

    name = "shard-weights"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        entries: list[Match | NoMatch] = []
        sharders: tuple[tuple[object, Callable[[GraphModule, Node], str]], ...] = (
            (moec.cached_attention.default, _shard_attention),
            (moec.experts.default, _shard_experts),
            (moec.gated_mlp.default, _shard_mlp),
            (aten.embedding.default, _shard_embedding),
            (aten.linear.default, _shard_head),
        )
        for target, shard in sharders:
            for node in [n for n in calls(gm, target) if "share" in n.meta]:
                reason = shard(gm, node)
                node.meta.pop("share", None)
                entries.append(
                    NoMatch(reason, node.name, layer_of(node)) if reason else Match(node.name, layer_of(node))
                )
        ledger = Ledger.of(entries)
        if ledger.matched:
            remove_dead(gm)
            _recompute(gm)
        return PassResult(gm, bool(ledger.matched), ledger)


def _stored(gm: GraphModule, node: object) -> Weight | None:
    return weights_of(gm).get(str(node.target)) if isinstance(node, Node) and node.op == "get_attr" else None


def _cut(gm: GraphModule, old: Node, dim: int, ranges: Sequence[tuple[int, int]], at: Node) -> Node:
    """A get_attr node, before `at`, for the concatenation of ranges of a stored weight along `dim`."""
    weight = weights_of(gm)[str(old.target)]
    parts = [slice_(weight, dim, start, stop) for start, stop in ranges]
    with gm.graph.inserting_before(at):
        return weight_node(gm, f"{old.target}_part", parts[0] if len(parts) == 1 else concat(parts, dim))


def _shard_attention(gm: GraphModule, node: Node) -> str:
    share: LayerShare = node.meta["share"]
    heads = (share.query_heads, share.kv_heads, share.kv_heads)
    chains = [_projection(gm, node.args[i]) for i in range(3)]
    output = _output_projection(gm, node)
    if any(isinstance(c, str) for c in (*chains, output)):
        return next(c for c in (*chains, output) if isinstance(c, str))
    linears = {c[-1] for c in chains if isinstance(c, list)}
    if len(linears) < 3:
        return "queries, keys and values come from one product; place before they are joined"
    for chain, span in zip(chains, heads, strict=True):
        if isinstance(chain, list):
            _narrow(gm, chain, span)
    for i in (3, 4):
        _narrow_cache(node.args[i], share.kv_heads)
    sinks = argument(node, 7, "sinks")
    if sinks is not None:
        cut = _cut(gm, sinks, 0, [(share.query_heads.start, share.query_heads.stop)], node)
        node.args = (*node.args[:7], cut, *node.args[8:])
    if isinstance(output, list):
        _narrow_output(gm, node, output, share.query_heads)
    return ""


def _projection(gm: GraphModule, node: object) -> list[Node] | str:
    """From an attention operand back to its projection, that one last; or why not."""
    chain: list[Node] = []
    while isinstance(node, Node):
        if is_call(node, aten.linear.default) and _stored(gm, node.args[1]) is not None:
            return [*chain, node]
        if not is_call(node, *VIEWS, *PER_HEAD) or len(node.users) > 1:
            break
        whole = is_call(node, moec.rms_norm.default) and node.meta["val"].dim() < 3
        if whole or (is_call(node, aten.mul.Tensor) and isinstance(node.args[1], Node)):
            return f"{node.name}: works on all heads at once, so that a rank's heads alone would give another result"
        chain.append(node)
        node = node.args[0]
    return f"{node}: between a projection and its attention stands {getattr(node, 'target', 'a constant')}"


def _output_projection(gm: GraphModule, node: Node) -> list[Node] | str:
    """From the attention forward to the output projection, that one last; or why not."""
    chain, at = [], node
    while len(at.users) == 1:
        at = next(iter(at.users))
        chain.append(at)
        if is_call(at, aten.linear.default) and _stored(gm, at.args[1]) is not None:
            return chain
        if not is_call(at, *VIEWS, aten.to.dtype):
            break
    return f"{at.name}: the attention's result goes elsewhere than into one output projection"


def _narrow(gm: GraphModule, chain: list[Node], span: Span) -> None:
    """Cuts a projection's rows to a span of heads, and the views behind it."""
    linear = chain[-1]
    rows = _rows(linear)
    width = rows // span.total
    bias = argument(linear, 2, "bias")
    kept = [(span.start * width, span.stop * width)]
    args = [linear.args[0], _cut(gm, linear.args[1], 0, kept, linear)]
    linear.args = tuple(args if bias is None else [*args, _cut(gm, bias, 0, kept, linear)])
    linear.kwargs = {}
    for view in chain[:-1]:
        if is_call(view, *VIEWS):
            sizes = [_fewer(s, {rows: span.size * width, span.total: span.size}, i) for i, s in enumerate(view.args[1])]
            view.args = (view.args[0], sizes)


def _fewer(size: Any, to: dict[int, int], position: int) -> Any:
    return to.get(size, size) if isinstance(size, int) and position == 1 else size


def _rows(linear: Node) -> int:
    return int(linear.args[1].meta["val"].shape[0])


def _narrow_output(gm: GraphModule, node: Node, chain: list[Node], span: Span) -> None:
    linear = chain[-1]
    columns = int(linear.args[1].meta["val"].shape[1])
    width = columns // span.total
    for view in chain[:-1]:
        if is_call(view, *VIEWS):
            to = {columns: span.size * width, span.total: span.size}
            view.args = (view.args[0], [_fewer(s, to, i) for i, s in enumerate(view.args[1])])
    bias = argument(linear, 2, "bias") if span.start == 0 else None
    cut = _cut(gm, linear.args[1], 1, [(span.start * width, span.stop * width)], linear)
    linear.args, linear.kwargs = (linear.args[0], cut, *([] if bias is None else [bias])), {}
    linear.meta["partial"] = True


def _narrow_cache(cache: Node, span: Span) -> None:
    val = cache.meta["val"]
    shape = (val.shape[0], val.shape[1], span.size, val.shape[3])
    if isinstance(val, FakeTensor):
        with val.fake_mode:
            cache.meta["val"] = torch.empty(shape, dtype=val.dtype, device=val.device)
    else:
        cache.meta["val"] = val.new_empty(shape)


def _shard_experts(gm: GraphModule, node: Node) -> str:
    share: LayerShare = node.meta["share"]
    x, weights, chosen, w_in, w_out, b_in, b_out = node.args[:7]
    columns, act = share.expert_columns, str(argument(node, 8, "act"))
    if argument(node, 9, "num_shared", 0) or columns is None:
        return "shared experts are stacked behind the routed ones; place before that"
    if argument(node, 11, "transposed", False) or argument(node, 12, "interleaved", False):
        return "the expert weights are not in canonical layout"
    if _stored(gm, w_in) is None or _stored(gm, w_out) is None:
        return "an expert weight is computed in the graph"
    runs = _runs(share.experts)
    kept = [(columns.start, columns.stop)]
    both = (
        kept
        if not Activation.parse(act).gated
        else [*kept, (columns.total + columns.start, columns.total + columns.stop)]
    )
    new_in = _cut(gm, _held(gm, w_in, runs, node), 1, both, node)
    new_out = _cut(gm, _held(gm, w_out, runs, node), 2, kept, node)
    new_b_in = None if b_in is None else _cut(gm, _held(gm, b_in, runs, node), 1, both, node)
    new_b_out = _held(gm, b_out, runs, node) if b_out is not None and columns.start == 0 else None
    with gm.graph.inserting_before(node):
        if len(share.experts) < share.num_experts:
            chosen = _local_numbers(gm, chosen, share, node)
    node.args = (x, weights, chosen, new_in, new_out, new_b_in, new_b_out, *node.args[7:])
    node.meta["partial"] = True
    return ""


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as half-open runs."""
    runs: list[tuple[int, int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n:
            runs[-1] = (runs[-1][0], n + 1)
        else:
            runs.append((n, n + 1))
    return runs


def _held(gm: GraphModule, stack: Node, runs: list[tuple[int, int]], at: Node) -> Node:
    return stack if runs == [(0, int(stack.meta["val"].shape[0]))] else _cut(gm, stack, 0, runs, at)


def _local_numbers(gm: GraphModule, chosen: Node, share: LayerShare, like: Node) -> Node:
    """chosen [T, K] -> numbers among the resident experts; len(experts) for one that is not held."""
    table = torch.full((share.num_experts,), len(share.experts), dtype=torch.int64)
    table[list(share.experts)] = torch.arange(len(share.experts))
    local = weight_node(gm, f"{like.name}_local_expert", literal(table))
    index = call(gm.graph, aten.to.dtype, (chosen, torch.int64), like=like)
    return call(gm.graph, aten.index.Tensor, (local, [index]), like=like)


def _shard_mlp(gm: GraphModule, node: Node) -> str:
    span: Span = node.meta["share"].dense
    x, w_in, w_out, b_in, b_out, act = node.args
    if _stored(gm, w_in) is None or _stored(gm, w_out) is None:
        return "a weight of the dense FFN is computed in the graph"
    kept = [(span.start, span.stop)]
    both = [*kept, (span.total + span.start, span.total + span.stop)] if Activation.parse(act).gated else kept
    new_b_in = None if b_in is None else _cut(gm, b_in, 0, both, node)
    cuts = (_cut(gm, w_in, 0, both, node), _cut(gm, w_out, 1, kept, node))
    node.args = (x, *cuts, new_b_in, b_out if span.start == 0 else None, act)
    node.meta["partial"] = True
    return ""


def _shard_embedding(gm: GraphModule, node: Node) -> str:
    """Rows outside the span read row 0 and are set to zero; ranks add up."""
    span: Span = node.meta["share"]
    if _stored(gm, node.args[0]) is None:
        return "an embedding whose weights are computed in the graph"
    tokens, dtype = node.args[1], node.meta["val"].dtype
    rows = _cut(gm, node.args[0], 0, [(span.start, span.stop)], node)
    users = list(node.users)
    with gm.graph.inserting_before(node):
        shifted = call(gm.graph, aten.sub.Tensor, (tokens, span.start), like=node)
        clamped = call(gm.graph, aten.clamp.default, (shifted, 0, span.size - 1), like=node)
        inside = call(gm.graph, aten.eq.Tensor, (shifted, clamped), like=node)
        looked = call(gm.graph, aten.embedding.default, (rows, clamped), like=node)
        mask = call(
            gm.graph, aten.to.dtype, (call(gm.graph, aten.unsqueeze.default, (inside, -1), like=node), dtype), like=node
        )
        masked = call(gm.graph, aten.mul.Tensor, (looked, mask), like=node)
    for user in users:
        user.replace_input_with(node, masked)
    masked.meta["partial"] = True
    return ""


def _shard_head(gm: GraphModule, node: Node) -> str:
    """Rows of the output projection; the logits of other rows are zero here, so that ranks add up."""
    span: Span = node.meta["share"]
    if argument(node, 2, "bias") is not None or _stored(gm, node.args[1]) is None:
        return "an output projection with a bias or computed weights"
    users = list(node.users)
    node.args = (node.args[0], _cut(gm, node.args[1], 0, [(span.start, span.stop)], node))
    node.meta["val"] = fake_value(node.target, node.args)
    with gm.graph.inserting_before(node.next):
        padded = _zero_columns_around(gm, node, span)
    for user in users:
        user.replace_input_with(node, padded)
    padded.meta["partial"] = True
    return ""


def _zero_columns_around(gm: GraphModule, node: Node, span: Span) -> Node:
    """[T, size] -> [T, total] with zeros outside the span; composed of ops whose shape functions keep T symbolic."""
    column = call(gm.graph, aten.slice.Tensor, (node, -1, 0, 1), like=node)
    zero = call(gm.graph, aten.zeros_like.default, (column,), like=node)
    around = []
    for count in (span.start, span.total - span.stop):
        around.append([call(gm.graph, aten.expand.default, (zero, [-1, count]), like=node)] if count else [])
    return call(gm.graph, aten.cat.default, ([*around[0], node, *around[1]], -1), like=node)


def _recompute(gm: GraphModule) -> None:
    """Fake values of every call whose operands, or arguments, may have changed size."""
    for node in gm.graph.nodes:
        reads_tensor = any(isinstance(p.meta.get("val"), Tensor | tuple | list) for p in node.all_input_nodes)
        if node.op == "call_function" and reads_tensor and not isinstance(node.meta["val"], torch.SymInt):
            node.meta["val"] = fake_value(node.target, node.args, dict(node.kwargs))
