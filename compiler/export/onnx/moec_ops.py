"""The moec ops of a canonical graph in ONNX: gates, norms, rotations, attention, experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from moec.compiler.export.onnx import attention, experts
from moec.compiler.export.onnx.attention import Batch
from moec.compiler.export.onnx.builder import LAST
from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.onnx.gate import emit_gate
from moec.compiler.export.onnx.values import Values, dtype_of
from moec.passes.ir.gate import GateSpec

moec = torch.ops.moec


@dataclasses.dataclass(frozen=True)
class Context:
    """batch: None in a plain module.  sites: the experts by node.  kind: of their nodes."""

    values: Values
    batch: Batch | None
    sites: dict[Node, experts.Site]
    kind: str


def arguments(node: Node) -> dict[str, Any]:
    """A moec op's arguments by name, defaults among them."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def _gate(c: Context, node: Node) -> tuple[ir.Value, ir.Value]:
    a, v = arguments(node), c.values
    spec, given = GateSpec.decode(a["spec"]), dtype_of(a["logits"])
    compute = given if spec.compute_dtype == "logits" else getattr(torch, spec.compute_dtype)
    return emit_gate(v.b, spec, v.tensor(a["logits"]), given, v.optional(a["selection_bias"], compute))


def _rms_norm(c: Context, node: Node) -> ir.Value:
    """In float32, as passes/ir/ops.py: normalise()."""
    a, b, dtype = arguments(node), c.values.b, dtype_of(node)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    h = c.values.tensor(a["x"], wide)
    if a["centre"]:
        h = b.op("Sub", h, b.op("ReduceMean", h, b.ints(-1), keepdims=1))
    mean = b.op("ReduceMean", b.op("Mul", h, h), b.ints(-1), keepdims=1)
    h = b.op("Div", h, b.op("Sqrt", b.op("Add", mean, b.number(a["eps"], wide))))
    if a["weight"] is None:
        return h if wide is dtype else b.cast(h, dtype)
    inner = dtype if a["cast"] == "before_weight" else wide
    w = c.values.tensor(a["weight"], inner)
    w = b.op("Add", w, b.number(a["offset"], inner)) if a["offset"] else w
    y = b.op("Mul", h if inner is wide else b.cast(h, inner), w)
    return y if inner is dtype else b.cast(y, dtype)


def _rope(c: Context, node: Node) -> ir.Value:
    """As passes/ir/ops.py: moec::rope."""
    a, b, v = arguments(node), c.values.b, c.values
    dtype = dtype_of(a["x"]) if a["compute_dtype"] == "input" else getattr(torch, a["compute_dtype"])
    width, turned, pairing = int(a["x"].meta["val"].shape[-1]), a["rotary_dim"], a["pairing"]
    cos, sin = (b.unsqueeze(v.tensor(a[n], dtype), 1) for n in ("cos", "sin"))  # [T, 1, R/2]
    x = v.tensor(a["x"], dtype)
    part = x if turned == width else b.slice(x, 2, 0, turned)
    if pairing == "half":
        first, second = b.slice(part, 2, 0, turned // 2), b.slice(part, 2, turned // 2, turned)
    else:
        first, second = b.slice(part, 2, 0, LAST, 2), b.slice(part, 2, 1, LAST, 2)
    left = b.op("Sub", b.op("Mul", first, cos), b.op("Mul", second, sin))
    right = b.op("Add", b.op("Mul", second, cos), b.op("Mul", first, sin))
    if pairing == "interleaved":
        both = b.op("Concat", b.unsqueeze(left, 3), b.unsqueeze(right, 3), axis=3)
        parts = [b.op("Reshape", both, b.ints(0, 0, turned))]
    else:
        parts = [left, right]
    if turned != width:
        parts.append(b.slice(x, 2, turned, LAST))
    y = parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=-1)
    return y if dtype is dtype_of(node) else b.cast(y, dtype_of(node))


def _batch(c: Context, node: Node) -> Batch:
    """Raises: ExportError: attention over a cache in a plain module, or not in float32."""
    if c.batch is None:
        raise ExportError(f"{node.name}: attention over a cache stands in a plain module")
    if dtype_of(node) is not torch.float32:
        raise ExportError(f"{node.name}: attention in {dtype_of(node)}; --weights f32")
    return c.batch


def _sizes(node: Node) -> tuple[int, int]:
    """Heads and width of [T, heads, width]."""
    heads, width = node.meta["val"].shape[-2:]
    return int(heads), int(width)


def _cached_attention(c: Context, node: Node) -> ir.Value:
    a, v = arguments(node), c.values
    heads, _ = shape = _sizes(a["q"])
    sinks = v.optional(a["sinks"], torch.float32)
    if sinks is not None:
        sinks = v.b.reshape(sinks, 1, heads, 1, 1)
    return attention.cached_attention(
        _batch(c, node),
        (shape, _sizes(a["v"])),
        (v.tensor(a["q"]), v.tensor(a["k"]), v.tensor(a["v"])),
        (a["k_cache"].name, a["v_cache"].name),
        (a["scale"], a["window"], a["chunk"], a["softcap"]),
        sinks,
    )


def _biased_attention(c: Context, node: Node) -> ir.Value:
    a, v, batch = arguments(node), c.values, _batch(c, node)
    heads, _ = shape = _sizes(a["q"])
    sinks = v.optional(a["sinks"], torch.float32)  # [T, Q]
    if sinks is not None:
        sinks = v.b.unsqueeze(v.b.transpose(batch.reshape(sinks, "B", "S", heads), 0, 2, 1), 3)
    return attention.cached_attention(
        batch,
        (shape, _sizes(a["v"])),
        (v.tensor(a["q"]), v.tensor(a["k"]), v.tensor(a["v"])),
        (a["k_cache"].name, a["v_cache"].name),
        (a["scale"], a["window"], 0, 0.0),
        sinks,
        (v.tensor(a["bias"], torch.float32), int(a["bias"].meta["val"].shape[-1])),
    )


def _latent_attention(c: Context, node: Node) -> ir.Value:
    a, v = arguments(node), c.values
    heads, width = _sizes(a["q"])
    nope, latent = a["nope_dim"], int(a["latent"].meta["val"].shape[-1])
    _, out_width = _sizes(node)
    return attention.latent_attention(
        _batch(c, node),
        (heads, nope, width - nope, latent, out_width),
        tuple(v.tensor(a[n]) for n in ("q", "latent", "k_rope", "w_kv_b")),  # type: ignore[arg-type]
        (a["latent_cache"].name, a["rope_cache"].name),
        a["scale"],
    )


def _experts(c: Context, node: Node) -> ir.Value:
    return experts.emit(c.values, c.sites[node], c.kind)


MOEC_OPS: dict[Any, Callable[[Context, Node], Any]] = {
    moec.gate.default: _gate,
    moec.rms_norm.default: _rms_norm,
    moec.rope.default: _rope,
    moec.cached_attention.default: _cached_attention,
    moec.biased_attention.default: _biased_attention,
    moec.latent_attention.default: _latent_attention,
    moec.experts.default: _experts,
}
