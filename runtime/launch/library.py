"""The moec ops by library calls (torch, oneDNN): what a program's "library" steps name.

An entry is a builder: it takes the step's constants once, when the engine is loaded, and gives the function that the
step calls with tensors alone. Functions in NEEDS_BATCH get the runtime.batch.Batch of the call first; builders in
NEEDS_WEIGHTS get the step's weights, None in the places of other arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.runtime.launch.activation import activation
from moec.runtime.launch.attention import cached_attention, cached_attention_int8
from moec.runtime.launch.biased import biased_attention
from moec.runtime.launch.compressed import compressed_attention, pool_windows
from moec.runtime.launch.expert_graphs import expert_graphs
from moec.runtime.launch.experts import combine_gemm, dispatch, experts, grouped_gemm, stored_experts
from moec.runtime.launch.gate import router
from moec.runtime.launch.latent import latent_attention, sparse_latent_attention
from moec.runtime.launch.limit import LimitSlots
from moec.runtime.launch.sparse import index_blocks, index_topk, sparse_attention
from moec.runtime.launch.states import recurrence, shift_window
from moec.runtime.launch.stored import stored_embedding, stored_linear, stored_weight

Function = Callable[..., Any]


def gate(spec: str) -> Function:
    """-> f(logits [T,E], selection_bias?) -> weights f32[T,K], experts i32[T,K]."""
    return router(spec)


def gate_linear(spec: str, router_dtype: str) -> Function:
    """-> f(x [T,H], w [E,H], bias?, selection_bias?) -> as gate; the router GEMM runs in router_dtype."""
    route, dtype = router(spec), getattr(torch, router_dtype)

    def apply(x: Tensor, w: Tensor, bias: Tensor | None, selection_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype))
        return route(logits, selection_bias)

    return apply


def gated_mlp(act: str) -> Function:
    """-> f(x [T,H], w_gate_up [2F,H], w_down [H,F], b_gate_up?, b_down?) -> [T,H]."""
    act_fn = activation(act)

    def apply(x: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None) -> Tensor:
        return F.linear(act_fn(F.linear(x, w_in, b_in)), w_out, b_out)

    return apply


def rms_norm(eps: float, cast: str = "before_weight", offset: float = 0.0, centre: bool = False) -> Function:
    """-> f(x [..,H], weight?) -> [..,H]; RMS (centre: LayerNorm without bias) in float32.

    cast: "before_weight" rounds to x.dtype before the weight is applied, "after_weight" after. offset: on the weight.
    """

    def apply(x: Tensor, weight: Tensor | None) -> Tensor:
        if x.dtype == torch.float32 and not offset and not centre and weight is not None and weight.dim() == 1:
            return torch.rms_norm(x, weight.shape, weight.float(), eps)
        h = x if x.dtype == torch.float64 else x.float()
        if centre:
            h = h - h.mean(-1, keepdim=True)
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        if weight is None:
            return h.to(x.dtype)
        if cast == "before_weight":
            return ((weight + offset if offset else weight) * h.to(x.dtype)).to(x.dtype)
        wide = weight.to(h.dtype)
        return (h * (wide + offset if offset else wide)).to(x.dtype)

    return apply


def add_rms_norm(eps: float, cast: str = "before_weight", offset: float = 0.0, centre: bool = False) -> Function:
    """-> f(x, residual, weight?) -> rms_norm(residual + x), residual + x."""
    norm = rms_norm(eps, cast, offset, centre)

    def apply(x: Tensor, residual: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        total = residual + x
        return norm(total, weight), total

    return apply


def rope(pairing: str, rotary_dim: int, compute_dtype: str = "input") -> Function:
    """-> f(x [T,Q,D], cos, sin [T,rotary_dim/2]) -> [T,Q,D]; pairing: half, interleaved, deinterleaved."""

    def apply(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        dtype = x.dtype if compute_dtype == "input" else getattr(torch, compute_dtype)
        c, s = cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)  # [T, 1, R/2]
        turning = (x if rotary_dim == x.shape[-1] else x[..., :rotary_dim]).to(dtype)
        a, b = turning.chunk(2, -1) if pairing == "half" else (turning[..., ::2], turning[..., 1::2])
        pair = a * c - b * s, b * c + a * s
        turned = torch.stack(pair, -1).flatten(-2) if pairing == "interleaved" else torch.cat(pair, -1)
        turned = turned.to(x.dtype)
        return turned if rotary_dim == x.shape[-1] else torch.cat([turned, x[..., rotary_dim:]], -1)

    return apply


def select_rows() -> Function:
    """-> f(x [T,H], rows i64[R], rising) -> [R,H]; x itself where all rows are wanted."""

    def apply(x: Tensor, rows: Tensor) -> Tensor:
        return x if rows.shape[0] == x.shape[0] else x.index_select(0, rows)

    return apply


def copy_into() -> Function:
    """-> f(source, target): target gets source's values."""
    return lambda source, target: target.copy_(source)


def prepacked_linear(weights: Sequence[Tensor | None]) -> Function:
    """-> f(x [T,K], w, bias) -> [T,N] by oneDNN, whose layout of the weight is made here, when the engine is loaded."""
    _, weight, bias = weights
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
    linear = torch.ops.mkldnn._linear_pointwise.default._op

    def apply(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return linear(x, packed, bias, "none", [], "")

    return apply


PACKED_FOR_ROWS = 64  # what oneDNN is told that the rows will be; it serves any number

LIBRARY: dict[str, Callable[..., Function]] = {
    "gate": gate,
    "gate_linear": gate_linear,
    "limit_slots": LimitSlots,
    "experts": experts,
    "expert_graphs": expert_graphs,
    "stored_experts": stored_experts,
    "stored_linear": stored_linear,
    "stored_embedding": stored_embedding,
    "stored_weight": stored_weight,
    "dispatch": dispatch,
    "grouped_gemm": grouped_gemm,
    "combine_gemm": combine_gemm,
    "gated_mlp": gated_mlp,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "rope": rope,
    "cached_attention": cached_attention,
    "cached_attention_int8": cached_attention_int8,
    "latent_attention": latent_attention,
    "compressed_attention": compressed_attention,
    "pool_windows": pool_windows,
    "index_topk": index_topk,
    "index_blocks": index_blocks,
    "sparse_attention": sparse_attention,
    "sparse_latent_attention": sparse_latent_attention,
    "biased_attention": biased_attention,
    "recurrence": recurrence,
    "shift_window": shift_window,
    "prepacked_linear": prepacked_linear,
    "select_rows": select_rows,
    "copy_into": copy_into,
}
NEEDS_BATCH = frozenset(
    {
        "cached_attention",
        "cached_attention_int8",
        "latent_attention",
        "biased_attention",
        "recurrence",
        "shift_window",
        "compressed_attention",
        "pool_windows",
        "index_topk",
        "index_blocks",
        "sparse_attention",
        "sparse_latent_attention",
    }
)
NEEDS_WEIGHTS = frozenset({"prepacked_linear"})
ON_DEVICE = frozenset(
    {
        "gate",
        "gate_linear",
        "experts",
        "stored_experts",
        "stored_linear",
        "stored_embedding",
        "stored_weight",
        "dispatch",
        "grouped_gemm",
        "combine_gemm",
        "gated_mlp",
        "rms_norm",
        "add_rms_norm",
        "rope",
        "cached_attention",
        "cached_attention_int8",
        "latent_attention",
        "select_rows",
        "copy_into",
    }
)
"""Those that run where their tensors are, on a GPU too."""
WAITS = frozenset({"experts", "stored_experts", "grouped_gemm", "combine_gemm"})
"""Those of ON_DEVICE where the host waits for what the device has counted: no CUDA graph holds them."""
