"""Cuts one attention block to the heads that a rank holds: its projections, caches, sinks and output projection.

Latent attention (DeepSeek-V2) keeps its latent projections and its cache whole: they have no heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from moec.passes.infra.rewrite import argument, is_call
from moec.passes.ir.weights import weight_of
from moec.passes.placement.rank_shares import LayerShare
from moec.passes.placing.weight_parts import cut, runs

aten, moec = torch.ops.aten, torch.ops.moec
VIEWS = (aten.view.default, aten.reshape.default)
PER_HEAD = (
    moec.rope.default,
    moec.rms_norm.default,
    aten.to.dtype,
    aten.mul.Tensor,
    aten.clamp.default,
    aten.slice.Tensor,
    aten.split_with_sizes.default,
    aten.cat.default,
)
"""What may stand between a projection and the attention: each works on every head alone."""


def shard_attention(gm: GraphModule, node: Node, share: LayerShare) -> str:
    """Cuts the block around `node`; returns why it cannot, and then has changed nothing."""
    latent = is_call(node, moec.latent_attention.default)
    queries = tuple(range(share.query_heads.start, share.query_heads.stop))
    wanted = [(node.args[0], queries, share.query_heads.total)]
    if not latent:
        wanted += [(node.args[i], share.kv_heads, share.num_kv_heads) for i in (1, 2)]
    regions = [_region(gm, operand, node) for operand, _, _ in wanted]
    output = _output_projection(gm, node)
    reason = next((r for r in (*regions, output) if isinstance(r, str)), "")
    if reason:
        return reason
    products = [next(n for n in r if is_call(n, aten.linear.default)) for r in regions if not isinstance(r, str)]
    if len(set(products)) < len(products):
        return "queries, keys and values come from one product; place before they are joined"
    if latent and weight_of(gm, node.args[3]) is None:
        return f"{node.args[3]}: the latent's up-projection is computed in the graph"
    for region, (_, heads, total) in zip(regions, wanted, strict=True):
        _narrow(gm, list(region), heads, total)
    if latent:
        _cut_argument(gm, node, 3, queries, share.query_heads.total)
    else:
        for i in (3, 4):
            _narrow_cache(node.args[i], len(share.kv_heads))
        if argument(node, 7, "sinks") is not None:
            _cut_argument(gm, node, 7, queries, share.query_heads.total)
    _narrow_output(gm, list(output), queries, share.query_heads.total)
    return ""


def _region(gm: GraphModule, operand: object, attention: Node) -> list[Node] | str:
    """The nodes between an attention operand and its one projection, that among them; or why heads cannot be cut."""
    found: dict[Node, None] = {}
    todo, products = [operand], set()
    while todo:
        node = todo.pop()
        if not isinstance(node, Node) or node in found:
            continue
        found[node] = None
        if is_call(node, aten.linear.default) and weight_of(gm, node.args[1]) is not None:
            products.add(node)
            continue
        reason = _mixes_heads(node)
        if reason:
            return f"{node}: {reason}"
        todo += node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
    outside = [u for n in found for u in n.users if u not in found and u is not attention]
    if outside:
        return f"{outside[0].name}: reads a projection beside its attention"
    return list(found) if len(products) == 1 else f"{operand}: comes from {len(products)} products with weights"


def _mixes_heads(node: Node) -> str:
    """Why a node does not work on every head alone, "" where it does."""
    if not is_call(node, *VIEWS, *PER_HEAD) and "getitem" not in str(node.target):
        return f"between a projection and its attention stands {getattr(node, 'target', 'a constant')}"
    val = node.meta["val"]
    if is_call(node, moec.rms_norm.default):
        weight = node.args[1]
        whole = val.dim() < 3 or (isinstance(weight, Node) and weight.meta["val"].dim() > 1)
        return "works on all heads at once, so that a rank's heads alone would give another result" if whole else ""
    if is_call(node, aten.mul.Tensor) and isinstance(node.args[1], Node):
        other = node.args[1].meta["val"]
        per_token = other.dim() == val.dim() == 3 and other.shape[1] == 1
        return "" if per_token else "is multiplied by another value, which may differ by head"
    along_last = {aten.slice.Tensor: 1, aten.split_with_sizes.default: 2, aten.cat.default: 1}
    if node.target in along_last:
        source = val[0] if isinstance(val, list | tuple) else val
        dim = argument(node, along_last[node.target], "dim", 0)
        return "" if source.dim() == 3 and dim in (-1, 2) else "cuts or joins along another axis than the head's width"
    return ""


def _output_projection(gm: GraphModule, node: Node) -> list[Node] | str:
    """From the attention forward to the output projection, that one last; or why not."""
    chain, at = [], node
    while len(at.users) == 1:
        at = next(iter(at.users))
        chain.append(at)
        if is_call(at, aten.linear.default) and weight_of(gm, at.args[1]) is not None:
            return chain
        if not is_call(at, *VIEWS, aten.to.dtype):
            break
    return f"{at.name}: the attention's result goes elsewhere than into one output projection"


def _narrow(gm: GraphModule, region: list[Node], heads: Sequence[int], total: int) -> None:
    """Cuts a projection's rows to some of its heads, and the views behind it."""
    linear = next(n for n in region if is_call(n, aten.linear.default))
    rows = int(linear.args[1].meta["val"].shape[0])
    width = rows // total
    kept = runs(heads, width)
    bias = argument(linear, 2, "bias")
    args = [linear.args[0], cut(gm, linear.args[1], 0, kept, linear)]
    linear.args = tuple(args if bias is None else [*args, cut(gm, bias, 0, kept, linear)])
    linear.kwargs = {}
    _narrow_views(region, {rows: len(heads) * width, total: len(heads)})


def _narrow_views(nodes: list[Node], to: dict[int, int]) -> None:
    for view in nodes:
        if is_call(view, *VIEWS):
            view.args = (view.args[0], [_fewer(size, to, i) for i, size in enumerate(view.args[1])])


def _fewer(size: Any, to: dict[int, int], position: int) -> Any:
    return to.get(size, size) if isinstance(size, int) and position == 1 else size


def _narrow_output(gm: GraphModule, chain: list[Node], heads: Sequence[int], total: int) -> None:
    linear = chain[-1]
    columns = int(linear.args[1].meta["val"].shape[1])
    width = columns // total
    _narrow_views(chain, {columns: len(heads) * width, total: len(heads)})
    bias = argument(linear, 2, "bias") if heads[0] == 0 else None
    part = cut(gm, linear.args[1], 1, runs(heads, width), linear)
    linear.args, linear.kwargs = (linear.args[0], part, *([] if bias is None else [bias])), {}
    linear.meta["partial"] = True


def _cut_argument(gm: GraphModule, node: Node, position: int, heads: Sequence[int], total: int) -> None:
    """Cuts a weight among a call's arguments, whose rows are those of all heads, to some of the heads."""
    weight = node.args[position]
    width = int(weight.meta["val"].shape[0]) // total
    part = cut(gm, weight, 0, runs(heads, width), node)
    node.args = (*node.args[:position], part, *node.args[position + 1 :])


def _narrow_cache(cache: Any, heads: int) -> None:
    val = cache.meta["val"]
    shape = (val.shape[0], val.shape[1], heads, val.shape[3])
    if isinstance(val, FakeTensor):
        with val.fake_mode:
            cache.meta["val"] = torch.empty(shape, dtype=val.dtype, device=val.device)
    else:
        cache.meta["val"] = val.new_empty(shape)
