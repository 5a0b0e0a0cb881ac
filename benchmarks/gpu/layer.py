"""One expert layer from launches of its kernels: what runs, in which order, on which buffers. Torch alone.

`kernels` are callables by name that take tensors and numbers by keyword: runtime.launch.cuda.Kernel on a GPU, the
emulator in tests. `entry` is a layer of the bundle's manifest (make_bundle.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moec.compiler.kernels.cuda import codes
from moec.passes.ir.formats import parse_format
from moec.passes.ir.quantise import Parts

CHUNK = 1024  # slots of a block of the dispatch kernels
FP8 = "float8_e4m3fn"
PLAIN = ("bfloat16", FP8)  # other dtypes of a shape are formats of codes


def make_weights(shape: Mapping[str, Any], device: str, seed: int = 0) -> dict[str, Tensor]:
    """w_gate_up [E,2F,H] and w_down [E,H,F] of unit gain, in the shape's dtype; f32 scales per row for e4m3.

    Codes are packed as the kernels want them, and kept as they are for the reference. The router is bf16 [E,H].
    """
    generator = torch.Generator(device).manual_seed(seed)
    stacked = shape["num_experts"] + shape["num_shared"]
    router = torch.empty(shape["num_experts"], shape["hidden"], dtype=torch.bfloat16, device=device)
    made = {"router": router.normal_(0, shape["hidden"] ** -0.5, generator=generator)}
    for name, rows, depth in (
        ("gate_up", 2 * shape["inner"], shape["hidden"]),
        ("down", shape["hidden"], shape["inner"]),
    ):
        if shape["dtype"] not in PLAIN:
            stored = _codes(shape["dtype"], (stacked, rows, depth), generator)
            made |= {f"{name}{part}": t for part, t in stored.items()}
            continue
        w = torch.empty(stacked, rows, depth, dtype=torch.bfloat16, device=device)
        for expert in w:
            expert.normal_(0, depth**-0.5, generator=generator)
        if shape["dtype"] == FP8:
            scale = w.abs().amax(-1).float() / 448
            made[f"{name}_scale"] = scale
            w = torch.stack([(e.float() / s[:, None]).to(torch.float8_e4m3fn) for e, s in zip(w, scale, strict=True)])
        made[name] = w
    return made


def _codes(name: str, shape: tuple[int, int, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Random codes of a format, scales that give unit gain: "" and "_scale" as kernels read them, and as they are."""
    format = parse_format(name).fitted(shape[2])
    device, (low, high) = generator.device, format.code_range
    numbers = torch.randint(low, high + 1, shape, generator=generator, device=device, dtype=torch.int8)
    scales = torch.rand(*shape[:1], *format.grid(*shape[1:]), generator=generator, device=device) + 0.5
    scales = (scales * shape[2] ** -0.5 / (high - low) * 12**0.5).to(torch.bfloat16 if format.group else torch.float32)
    w, w_scale = codes.pack(Parts(format, numbers, scales.float()))
    return {"": w, "_scale": w_scale, "_codes": numbers, "_scales": scales.float()}


class Layer:
    """The buffers of a layer for a number of tokens, and its launches. x [T,H] bf16, logits f32[T,E] -> y [T,H]."""

    def __init__(
        self,
        entry: Mapping[str, Any],
        kernels: Mapping[str, Callable[..., None]],
        weights: Mapping[str, Tensor],
        num_tokens: int,
        blocks: int,
    ) -> None:
        shape = self.shape = entry["shape"]
        self.entry, self.kernels, self.weights, self.blocks = entry, kernels, weights, blocks
        device = weights["down"].device
        self.slots_per_token = shape["top_k"] + shape["num_shared"]
        slots, stacked = num_tokens * self.slots_per_token, shape["num_experts"] + shape["num_shared"]
        self.num_tokens, self.slots, self.chunks = num_tokens, slots, -(-slots // CHUNK)
        self.tiles = min(slots, slots // entry["tile_rows"] + stacked)

        def new(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        bf16, f32 = torch.bfloat16, torch.float32
        self.x = new(num_tokens, shape["hidden"], dtype=bf16)
        self.logits = new(num_tokens, entry.get("routed", shape["num_experts"]), dtype=f32)
        self.route_weights, self.experts = new(num_tokens, shape["top_k"], dtype=f32), new(num_tokens, shape["top_k"])
        self.order = {"slot_order": new(slots), "expert_start": new(stacked + 1)}
        self.order |= {"tile_expert": new(self.tiles), "tile_row": new(self.tiles)}
        self.counts = new(self.chunks, stacked + 1)
        self.h = new(slots, shape["inner"], dtype=bf16)
        self.part = new(slots * entry["splits"], shape["hidden"], dtype=getattr(torch, entry["part_dtype"]))
        self.y = new(num_tokens, shape["hidden"], dtype=bf16)
        self.barrier = new(2).zero_()
        operand = torch.float8_e4m3fn if shape["dtype"] == FP8 else bf16
        self.x_rows = slots if entry["gathers"] else num_tokens
        self.x_operand = new(self.x_rows, shape["hidden"], dtype=operand) if "gather" in kernels else self.x
        self.h_operand = new(slots, shape["inner"], dtype=operand) if "quantise_h" in kernels else self.h
        self.x_scale, self.h_scale = new(self.x_rows, dtype=f32), new(slots, dtype=f32)

    def slot_experts_and_weights(self) -> tuple[Tensor, Tensor]:
        """Expert i64[S] and weight f32[S] of each slot; E + s stands for experts that are held elsewhere."""
        shape, n, device = self.shape, self.num_tokens, self.x.device
        stacked = shape["num_experts"] + shape["num_shared"]
        routed = self.experts.long()
        routed = torch.where(routed < shape["num_experts"], routed, stacked)
        shared = torch.arange(shape["num_experts"], stacked, device=device).expand(n, -1)
        ones = torch.ones(n, shape["num_shared"], device=device)
        return torch.cat([routed, shared], 1).reshape(-1), torch.cat([self.route_weights, ones], 1).reshape(-1)

    def slots_of_experts(self, experts: Tensor) -> Tensor:
        """i64[S] as above -> how many of each expert that is held, i64[E + s]; torch.bincount would wait."""
        stacked = self.shape["num_experts"] + self.shape["num_shared"]
        counts = torch.zeros(stacked + 1, dtype=torch.int64, device=experts.device)
        return counts.scatter_add_(0, experts, torch.ones_like(experts))[:stacked]

    def run(self) -> None:
        """Every launch of the layer."""
        k, n = self.kernels, self.num_tokens
        if "moe_decode" in k:
            self._run_decode(k["moe_decode"])
            return
        k["gate"](logits=self.logits, weights=self.route_weights, experts=self.experts, n=n)
        routing = self.order | {"experts": self.experts, "counts": self.counts}
        sizes = {"n": n, "chunks": self.chunks, "tiles": self.tiles}
        if self.chunks > 1:
            k["count"](**routing, **sizes)
        k["place_chunks" if self.chunks > 1 else "place"](**routing, **sizes)
        if "gather" in k:
            order = self.order["slot_order"]
            k["gather"](x=self.x, slot_order=order, y=self.x_operand, scale=self.x_scale, x_rows=n, rows=self.x_rows)
        self._gemm("gate_up", self.x_operand, self.x_scale, self.h)
        if "quantise_h" in k:
            k["quantise_h"](x=self.h, y=self.h_operand, scale=self.h_scale, x_rows=self.slots, rows=self.slots)
        self._gemm("down", self.h_operand, self.h_scale, self.part)
        k["combine"](part=self.part, weights=self.route_weights, experts=self.experts, y=self.y, n=n)

    def _run_decode(self, kernel: Callable[..., None]) -> None:
        """The layer in one launch: the router too, so that logits are a result and the routing is the kernel's own."""
        values = {"x": self.x, "router": self.weights["router"], "logits": self.logits, "h": self.h, "part": self.part}
        for name, short in (("gate_up", "up"), ("down", "down")):
            values[f"{short}_w"] = self.weights[name]
            if f"{name}_scale" in self.weights:
                values[f"{short}_w_scale"] = self.weights[f"{name}_scale"]
        values |= {"weights": self.route_weights, "experts": self.experts}
        sizes = {"n": self.num_tokens, "slots": self.slots, "parts": len(self.part)}
        kernel(**values, barrier=self.barrier, y=self.y, blocks=self.blocks * self.entry["blocks_per_sm"], **sizes)

    def _gemm(self, name: str, x: Tensor, scale: Tensor, y: Tensor) -> None:
        extra = {"w_scale": self.weights[f"{name}_scale"]} if f"{name}_scale" in self.weights else {}
        extra |= {"x_scale": scale} if self.shape["dtype"] == FP8 else {}
        sizes = {"x_rows": len(x), "slots": self.slots, "tiles": self.tiles, "blocks": self.blocks}
        self.kernels[name](x=x, w=self.weights[name], y=y, **extra, **self.order, **sizes)


def reference(layer: Layer) -> Tensor:
    """The layer's y in float64 from its x, its route_weights and experts; e4m3 weights times their scales."""
    shape, x = layer.shape, layer.x.double()
    y = torch.zeros_like(x)
    stacked = shape["num_experts"] + shape["num_shared"]

    def plain(name: str, e: int) -> Tensor:
        if f"{name}_codes" in layer.weights:
            numbers, scales = layer.weights[f"{name}_codes"][e].double(), layer.weights[f"{name}_scales"][e].double()
            return numbers * scales.repeat_interleave(numbers.shape[1] // scales.shape[1], 1)
        w = layer.weights[name][e].double()
        return w * layer.weights[f"{name}_scale"][e].double()[:, None] if shape["dtype"] == FP8 else w

    for e in range(stacked):
        if e < shape["num_experts"]:
            token, k = (layer.experts == e).nonzero(as_tuple=True)
            factor = layer.route_weights[token, k].double()
        else:
            token = torch.arange(layer.num_tokens, device=x.device)
            factor = torch.ones(layer.num_tokens, dtype=torch.float64, device=x.device)
        if len(token):
            gate, up = (x[token] @ plain("gate_up", e).T).chunk(2, -1)
            y.index_add_(0, token, (torch.nn.functional.silu(gate) * up) @ plain("down", e).T * factor[:, None])
    return y


def relative_error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of the reference; NaN counts as infinite."""
    error = (got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()
    return float(error.nan_to_num(float("inf")))
