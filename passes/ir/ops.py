"""The moec ops: schema, fake (shape) function and one plain PyTorch meaning each. They know no pass, device or kernel.

Letters: T tokens, H hidden, F expert inner width, E experts, K experts per token, S = T*(K + shared) slots, N sequences
in the cache (its slots), L cache length, Q query heads, C kv heads, D head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.passes.ir import (
    by_expert,
    state_ops,  # noqa: F401  (registers the ops of layers with a state)
)
from moec.passes.ir.activation import Activation
from moec.passes.ir.gate import GateSpec
from moec.passes.ir.sequences import sequences, visible


@torch.library.custom_op("moec::gate", mutates_args=())
def gate(logits: Tensor, selection_bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    """logits [T,E], selection_bias [E] -> weights f32[T,K], experts i32[T,K]; spec: GateSpec.encode()."""
    return GateSpec.decode(spec).apply(logits, selection_bias)


@gate.register_fake
def _(logits, selection_bias, spec):
    shape = (logits.shape[0], GateSpec.decode(spec).top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("moec::gate_linear", mutates_args=())
def gate_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, selection_bias: Tensor | None, spec: str, router_dtype: str
) -> tuple[Tensor, Tensor]:
    """x [T,H], w [E,H], bias [E] -> as moec::gate; the router GEMM runs in router_dtype ("float32", "bfloat16" ..)."""
    dtype = getattr(torch, router_dtype)
    logits = F.linear(x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype))
    return GateSpec.decode(spec).apply(logits, selection_bias)


@gate_linear.register_fake
def _(x, w, bias, selection_bias, spec, router_dtype):
    shape = (x.shape[0], GateSpec.decode(spec).top_k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("moec::experts", mutates_args=())
def experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    shared_weight: Tensor | None,
    act: str,
    num_shared: int = 0,
    weight_on_input: bool = False,
    transposed: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """The routed experts of one layer, dropless.

    x [T,H], weights [T,K], experts int[T,K], w_gate_up [E+s,2F,H] (gate half first; [E+s,F,H] for `!act`), w_down
    [E+s,H,F], b_gate_up [E+s,2F], b_down [E+s,H] -> y [T,H] in x.dtype. The last num_shared = s stacked experts see
    every token with weight shared_weight [T] (1 if None). weight_on_input: the weight multiplies the expert's input and
    not its output. transposed, interleaved: how a checkpoint stores the stacks ([E,H,2F]; gate and up in turn), absent
    from canonical graphs. An index >= E means "not held here" and adds nothing. Sums are in float32, rounded once.
    """
    rest = (b_gate_up, b_down, shared_weight, act, num_shared, weight_on_input, transposed, interleaved)
    return by_expert.run(by_expert.Experts(x, weights, experts, w_gate_up, w_down, *rest))


@experts.register_fake
def _(x, weights, experts, w_gate_up, w_down, b_gate_up, b_down, shared_weight, act, *layout):
    return torch.empty_like(x)


@torch.library.custom_op("moec::dispatch", mutates_args=())
def dispatch(experts: Tensor, num_experts: int, num_shared: int = 0) -> tuple[Tensor, Tensor]:
    """experts int[T,K] -> slot_order i32[S], expert_start i32[num_experts + num_shared + 1], S = T*(K+s).

    Slot t*(K+s)+k is token t's k-th expert, its k >= K the shared ones. slot_order lists the slots expert by expert,
    each expert's in token order; expert e's are slot_order[expert_start[e] : expert_start[e+1]]. Slots of an index
    >= num_experts ("not held here") come after the last of these; their rows of h are open and add nothing.
    """
    t = experts.shape[0]
    experts = experts.masked_fill(experts >= num_experts, num_experts + num_shared)
    shared = torch.arange(num_experts, num_experts + num_shared, device=experts.device, dtype=experts.dtype)
    flat = torch.cat([experts, shared.expand(t, num_shared)], 1).reshape(-1)
    order = torch.sort(flat, stable=True).indices.to(torch.int32)
    counts = torch.bincount(flat, minlength=num_experts + num_shared)[: num_experts + num_shared]
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return order, start.to(torch.int32)


@dispatch.register_fake
def _(experts, num_experts, num_shared=0):
    slots = experts.shape[0] * (experts.shape[1] + num_shared)
    new = experts.new_empty
    return new((slots,), dtype=torch.int32), new((num_experts + num_shared + 1,), dtype=torch.int32)


@torch.library.custom_op("moec::grouped_gemm", mutates_args=())
def grouped_gemm(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    slot_order: Tensor,
    expert_start: Tensor,
    slot_weight: Tensor | None,
    slots_per_token: int,
    act: str,
) -> Tensor:
    """Rows gathered by slot, one GEMM per expert, activation: x [T,H], w [E,2F,H] -> h [S,F], rows in slot_order.

    slot_weight [S] by slot id multiplies the input rows (weight_on_input), None elsewhere.
    """
    args = (x, w, bias, slot_order, expert_start, slot_weight, slots_per_token, act)
    return by_expert.run(by_expert.GroupedGemm(*args))


@grouped_gemm.register_fake
def _(x, w, bias, slot_order, expert_start, slot_weight, slots_per_token, act):
    return x.new_empty(slot_order.shape[0], w.shape[1] // 2 if Activation.parse(act).gated else w.shape[1])


@torch.library.custom_op("moec::combine_gemm", mutates_args=())
def combine_gemm(
    h: Tensor,
    w: Tensor,
    bias: Tensor | None,
    slot_order: Tensor,
    expert_start: Tensor,
    slot_weight: Tensor | None,
    slots_per_token: int,
) -> Tensor:
    """The down projection and the weighted sum per token: h [S,F] in slot_order, w [E,H,F] -> y [T,H] in h.dtype.

    slot_weight [S] by slot id; None: 1. The sum is in float32, rounded once.
    """
    args = (h, w, bias, slot_order, expert_start, slot_weight, slots_per_token)
    return by_expert.run(by_expert.CombineGemm(*args))


@combine_gemm.register_fake
def _(h, w, bias, slot_order, expert_start, slot_weight, slots_per_token):
    return h.new_empty(h.shape[0] // slots_per_token, w.shape[1])


@torch.library.custom_op("moec::gated_mlp", mutates_args=())
def gated_mlp(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None, act: str
) -> Tensor:
    """A dense FFN: x [T,H], w_gate_up [2F,H] (gate half first; [F,H] for `!act`), w_down [H,F] -> [T,H]."""
    return F.linear(Activation.parse(act)(F.linear(x, w_gate_up, b_gate_up)), w_down, b_down)


@gated_mlp.register_fake
def _(x, w_gate_up, w_down, b_gate_up, b_down, act):
    return torch.empty_like(x)


def normalise(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cast: str = "before_weight",
    offset: float = 0.0,
    centre: bool = False,
) -> Tensor:
    """RMS normalisation over the last axis in float32: x [..,H], weight [..,H] broadcastable -> [..,H] in x.dtype.

    cast: "before_weight" rounds to x.dtype, then multiplies by the weight; "after_weight" multiplies in float32 first.
    offset: added to the weight (1 for Gemma's form). centre: subtract the mean first (LayerNorm without bias).
    """
    h = x.float() if x.dtype != torch.float64 else x
    if centre:
        h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return h.to(x.dtype)
    if cast == "before_weight":
        return ((weight + offset if offset else weight) * h.to(x.dtype)).to(x.dtype)
    w = weight.to(h.dtype)
    return (h * (w + offset if offset else w)).to(x.dtype)


rms_norm = torch.library.custom_op("moec::rms_norm", mutates_args=())(normalise)


@rms_norm.register_fake
def _(x, weight, eps, cast="before_weight", offset=0.0, centre=False):
    return torch.empty_like(x)


@torch.library.custom_op("moec::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    cast: str = "before_weight",
    offset: float = 0.0,
    centre: bool = False,
) -> tuple[Tensor, Tensor]:
    """residual + x, and its moec::rms_norm: -> (normed [..,H], sum [..,H]); the sum is rounded to x.dtype first."""
    total = residual + x
    return normalise(total, weight, eps, cast, offset, centre).to(x.dtype), total


@add_rms_norm.register_fake
def _(x, residual, weight, eps, cast="before_weight", offset=0.0, centre=False):
    return torch.empty_like(x), torch.empty_like(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairing: str, rotary_dim: int, compute_dtype: str = "input") -> Tensor:
    """Rotary position embedding: x [T,Q,D], cos and sin [T,rotary_dim/2] -> [T,Q,D]; columns past rotary_dim stay.

    pairing "half": column i turns with i + rotary_dim/2; "interleaved": 2i with 2i+1, results stored in place;
    "deinterleaved": 2i with 2i+1, results stored at i and i + rotary_dim/2 (DeepSeek-V3).
    compute_dtype: "input" (x.dtype; cos and sin are rounded to it) or "float32" (one rounding at the end).
    """
    dtype = x.dtype if compute_dtype == "input" else getattr(torch, compute_dtype)
    c, s = cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)  # [T, 1, R/2]
    r, rest = x[..., :rotary_dim].to(dtype), x[..., rotary_dim:]
    a, b = r.chunk(2, -1) if pairing == "half" else (r[..., ::2], r[..., 1::2])
    pair = a * c - b * s, b * c + a * s
    turned = torch.stack(pair, -1).flatten(-2) if pairing == "interleaved" else torch.cat(pair, -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


rope = torch.library.custom_op("moec::rope", mutates_args=())(rotate)


@rope.register_fake
def _(x, cos, sin, pairing, rotary_dim, compute_dtype="input"):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("moec::cached_attention", mutates_args=("k_cache", "v_cache"))
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention of a ragged batch over its cache, new keys and values written first.

    q [T,Q,D], k [T,C,D], v [T,C,Dv], k_cache [N,L,C,D], v_cache [N,L,C,Dv], slots and positions i64[T] (which sequence,
    which place in it), sinks [Q] -> [T,Q,Dv]. Scores and softmax in float32. window, chunk, softcap: 0 means none.
    """
    k_cache[slots, positions] = k
    v_cache[slots, positions] = v
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    repeat = q.shape[1] // k.shape[1]
    for s, rows, p, n in sequences(slots, positions):
        keys = k_cache[s, :n].repeat_interleave(repeat, 1)
        values = v_cache[s, :n].repeat_interleave(repeat, 1)
        a = torch.einsum("qhd,khd->hqk", q[rows], keys) * scale
        if softcap:
            a = torch.tanh(a / softcap) * softcap
        a = a.float().masked_fill(~visible(p, n, window, chunk), -math.inf)
        if sinks is not None:
            a = torch.cat([a, sinks.float()[:, None, None].expand(-1, a.shape[1], 1)], -1)
        a = a.softmax(-1)[..., :n].to(q.dtype)
        out[rows] = torch.einsum("hqk,khd->qhd", a, values)
    return out


@cached_attention.register_fake
def _(q, k, v, k_cache, v_cache, slots, positions, sinks, scale, window=0, chunk=0, softcap=0.0):
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


@torch.library.custom_op("moec::latent_attention", mutates_args=("latent_cache", "rope_cache"))
def latent_attention(
    q: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_kv_b: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    nope_dim: int,
) -> Tensor:
    """Multi-head latent attention with the up-projection absorbed into the query.

    q [T,Q,nope+R], latent [T,C], k_rope [T,R] (rotated), w_kv_b [Q*(nope+Dv),C], caches [N,L,C], [N,L,R] -> [T,Q,Dv].
    Source: DeepSeek-V2, section 2.1.
    """
    latent_cache[slots, positions] = latent
    rope_cache[slots, positions] = k_rope
    heads = q.shape[1]
    w = w_kv_b.view(heads, -1, latent.shape[1])
    w_k, w_v = w[:, :nope_dim], w[:, nope_dim:]
    out = q.new_empty(q.shape[0], heads, w_v.shape[1])
    absorbed = torch.einsum("qhd,hdc->qhc", q[..., :nope_dim], w_k)
    for s, rows, p, n in sequences(slots, positions):
        a = torch.einsum("qhc,kc->hqk", absorbed[rows], latent_cache[s, :n])
        a = (a + torch.einsum("qhr,kr->hqk", q[rows][..., nope_dim:], rope_cache[s, :n])) * scale
        a = a.float().masked_fill(~visible(p, n), -math.inf).softmax(-1).to(q.dtype)
        out[rows] = torch.einsum("hqk,kc,hdc->qhd", a, latent_cache[s, :n], w_v)
    return out


@latent_attention.register_fake
def _(q, latent, k_rope, w_kv_b, latent_cache, rope_cache, slots, positions, scale, nope_dim):
    return q.new_empty(q.shape[0], q.shape[1], w_kv_b.shape[0] // q.shape[1] - nope_dim)
