"""A gate (passes/ir/gate.py) in standard operators: logits [T, E] -> weights f32[T, K], experts i32[T, K].

TopK, too, puts the lower index first among equal values.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from moec.compiler.export.onnx.builder import Builder
from moec.passes.ir.gate import GateSpec


def emit_gate(
    b: Builder, spec: GateSpec, logits: ir.Value, given: torch.dtype, bias: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """given: the logits' dtype.  bias: in the dtype that the scores are computed in."""
    compute = given if spec.compute_dtype == "logits" else getattr(torch, spec.compute_dtype)
    x = logits if compute == given else b.cast(logits, compute)
    weights, experts = _route(b, spec, _transformed(b, spec, x, compute), bias, compute)
    if spec.renormalise:
        total = b.op("ReduceSum", weights, b.ints(-1), keepdims=1)
        if spec.renorm_eps:
            rule = "Max" if spec.renorm_rule == "clamp" else "Add"
            total = b.op(rule, total, b.number(spec.renorm_eps, compute))
        weights = b.op("Div", weights, total)
    if spec.scale != 1.0:
        weights = b.op("Mul", weights, b.number(spec.scale, compute))
    rounded = given if spec.weights_dtype == "logits" else getattr(torch, spec.weights_dtype)
    if rounded != compute:
        weights = b.cast(weights, rounded)
    return weights if rounded is torch.float32 else b.cast(weights, torch.float32), b.cast(experts, torch.int32)


def _transformed(b: Builder, spec: GateSpec, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    parameter = b.number(spec.transform_param, dtype)
    if spec.transform == "std":
        centred = b.op("Sub", x, b.op("ReduceMean", x, b.ints(-1), keepdims=1))
        squares = b.op("ReduceSum", b.op("Mul", centred, centred), b.ints(-1), keepdims=1)
        others = b.cast(b.op("Sub", b.op("Shape", x, start=1, end=2), b.ints(1)), dtype)
        deviation = b.op("Sqrt", b.op("Div", squares, others))
        return b.op("Div", centred, b.op("Add", deviation, parameter))
    if spec.transform == "temperature":
        return b.op("Div", x, parameter)
    if spec.transform == "tanh_cap":
        return b.op("Mul", b.op("Tanh", b.op("Div", x, parameter)), parameter)
    return x


def _top(b: Builder, x: ir.Value, k: int) -> tuple[ir.Value, ir.Value]:
    values, indices = b.many("TopK", 2, x, b.ints(k), axis=-1, largest=1, sorted=1)
    return values, indices


def _score(b: Builder, name: str, x: ir.Value) -> ir.Value:
    if name == "softmax":
        return b.op("Softmax", x, axis=-1)
    return b.op("Sigmoid", x) if name == "sigmoid" else x


def _route(
    b: Builder, spec: GateSpec, x: ir.Value, bias: ir.Value | None, dtype: torch.dtype
) -> tuple[ir.Value, ir.Value]:
    if spec.score == "sparsemixer":
        return _sparsemixer(b, spec, x, dtype)
    scores = _score(b, spec.score, x) if spec.order == "score_then_topk" else x
    choice = scores
    if spec.bias_on != "none":
        choice = b.op("Add", x if spec.bias_on == "logits" else scores, bias)
    if spec.num_groups > 1:
        choice = _mask_groups(b, spec, choice, dtype)
    chosen, experts = _top(b, choice, spec.top_k)
    if choice is not scores:
        chosen = b.op("GatherElements", scores, experts, axis=-1)
    return (chosen if spec.order == "score_then_topk" else _score(b, spec.score, chosen)), experts


def _mask_groups(b: Builder, spec: GateSpec, choice: ir.Value, dtype: torch.dtype) -> ir.Value:
    grouped = b.op("Reshape", choice, b.ints(0, spec.num_groups, -1))  # [T, G, E/G]
    if spec.group_score == "max":
        score = b.op("ReduceMax", grouped, b.ints(-1), keepdims=0)
    else:
        width = b.op("Min", b.size(grouped, 2), b.ints(2))
        best, _ = b.many("TopK", 2, grouped, width, axis=-1, largest=1, sorted=1)
        score = b.op("ReduceSum", best, b.ints(-1), keepdims=0)
    _, kept = _top(b, score, spec.groups_kept)  # [T, kept]
    at = b.unsqueeze(kept, 1)
    groups = b.constant(np.arange(spec.num_groups, dtype=np.int64).reshape(1, -1, 1))
    hit = b.cast(b.op("Equal", at, groups), torch.float32)  # [T, G, kept]
    is_kept = b.cast(b.op("ReduceMax", hit, b.ints(-1), keepdims=1), torch.bool)
    masked = b.op("Where", is_kept, grouped, b.number(spec.group_mask, dtype))
    return b.op("Reshape", masked, b.op("Shape", choice))


def _sparsemixer(b: Builder, spec: GateSpec, x: ir.Value, dtype: torch.dtype) -> tuple[ir.Value, ir.Value]:
    """See GateSpec: winner by winner, each by a softmax over the logits that are near it."""
    lowest = b.number(float("-inf"), dtype)
    weights, experts = [], []
    rest, size = x, b.op("Abs", x)
    for turn in range(spec.top_k):
        best, winner = _top(b, rest, 1)
        distance = b.op("Div", b.op("Sub", best, x), b.op("Max", size, best))
        far = b.op("Greater", distance, b.number(2 * spec.jitter_eps, dtype))
        near = b.op("Softmax", b.op("Where", far, lowest, rest), axis=-1)
        weights.append(b.op("GatherElements", near, winner, axis=-1))
        experts.append(winner)
        if turn + 1 < spec.top_k:
            rest = b.op("ScatterElements", rest, winner, b.op("Expand", lowest, b.op("Shape", winner)), axis=-1)
    return b.op("Concat", *weights, axis=-1), b.op("Concat", *experts, axis=-1)
