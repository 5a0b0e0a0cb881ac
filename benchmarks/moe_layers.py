"""The MoE layers that bench_moe_layer.py times: shapes, random weights, the reference, moec's layer and its peers.

Every candidate takes x [T,H] and gives y [T,H], router included, and reads the same weight tensors (moec its packed
copy). Only three experts of a layer have values of their own; the others are copies at their own addresses, which read
from memory like any others and are made quickly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

Layer = Callable[[Tensor], Tensor]
DISTINCT_EXPERTS = 3
FEW_TOKENS = 512  # up to so many the kernel that holds router and gate is the faster way


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer. hidden H, inner F, experts E, top_k K, shared: width of the always-on FFN (a multiple of F, or 0)."""

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int
    shared: int
    renormalise: bool
    router_dtype: str  # as the model's own code has it

    @property
    def num_shared(self) -> int:
        """The shared FFN as so many more experts."""
        return self.shared // self.inner

    def distinct_bytes(self, num_experts: float, itemsize: int) -> float:
        """Bytes of the weights of that many routed experts and of the shared FFN."""
        return 3 * self.hidden * (num_experts * self.inner + self.shared) * itemsize

    def num_flops(self, num_tokens: int) -> int:
        """Products and sums of the experts."""
        return 6 * num_tokens * self.hidden * (self.top_k * self.inner + self.shared)


SHAPES = {
    s.name: s
    for s in (
        Shape("deepseek-moe-16b", 2048, 1408, 64, 6, 2816, False, "float32"),
        Shape("mixtral-8x7b", 4096, 14336, 8, 2, 0, True, "bfloat16"),
        Shape("qwen3-30b-a3b", 2048, 768, 128, 8, 0, True, "bfloat16"),
    )
}


@dataclasses.dataclass
class Weights:
    """router [E,H], gate_up [E+s,2F,H], down [E+s,H,F]: the shared FFN is cut into the last s experts.

    shared_gate_up [2*shared,H], shared_down [H,shared]: the same FFN in one piece, as the models have it.
    """

    router: Tensor
    gate_up: Tensor
    down: Tensor
    shared_gate_up: Tensor | None
    shared_down: Tensor | None


def random_weights(
    shape: Shape, dtype: torch.dtype, seed: int = 0, distinct_experts: int = DISTINCT_EXPERTS
) -> Weights:
    """Normal values of scale 0.02, on 2 MiB pages where the system gives them, for every candidate alike."""
    g = torch.Generator().manual_seed(seed)
    total = shape.experts + shape.num_shared

    def stack(rows: int, columns: int) -> Tensor:
        t = empty_huge((total, rows, columns), dtype)
        for e in range(total):
            fresh = e < distinct_experts
            t[e] = torch.randn(rows, columns, generator=g).mul_(0.02).to(dtype) if fresh else t[e % distinct_experts]
        return t

    router = torch.randn(shape.experts, shape.hidden, generator=g).mul_(0.02).to(dtype)
    weights = Weights(router, stack(2 * shape.inner, shape.hidden), stack(shape.hidden, shape.inner), None, None)
    if shape.shared:
        own_up, own_down = weights.gate_up[shape.experts :], weights.down[shape.experts :]
        weights.shared_gate_up = torch.cat(
            [own_up[:, : shape.inner].flatten(0, 1), own_up[:, shape.inner :].flatten(0, 1)]
        )
        weights.shared_down = torch.cat(list(own_down), 1)
    return weights


def empty_huge(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on huge pages."""
    from moec.runtime import pages

    num_bytes = dtype.itemsize
    for n in shape:
        num_bytes *= n
    return pages.empty_huge(num_bytes).view(dtype).view(shape)


def route(shape: Shape, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """weights f32[T,K], experts i64[T,K], as the models' own routers."""
    logits = router_logits(shape, weights.router.to(getattr(torch, shape.router_dtype)), x)
    chosen, experts = logits.float().softmax(-1).topk(shape.top_k, -1)
    return (chosen / chosen.sum(-1, keepdim=True) if shape.renormalise else chosen), experts


def router_logits(shape: Shape, router: Tensor, x: Tensor) -> Tensor:
    """[T,E] in the router's dtype."""
    return F.linear(x.to(router.dtype), router)


def decided_rows(shape: Shape, weights: Weights, x: Tensor) -> Tensor:
    """Tokens whose K-th and next logit differ: between equal ones any choice is right, and they are common in bf16."""
    logits = router_logits(shape, weights.router.to(getattr(torch, shape.router_dtype)), x).sort(-1).values
    return (logits[:, -shape.top_k] > logits[:, -shape.top_k - 1]).nonzero()[:, 0]


def reference(shape: Shape, weights: Weights, x: Tensor) -> Tensor:
    """The layer in f32, from the same weights: [T,H]."""
    chosen, experts = route(shape, weights, x)
    y, wide = torch.zeros(x.shape), x.float()

    def ffn(h: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gate, value = (h @ up.float().T).chunk(2, -1)
        return (F.silu(gate) * value) @ down.float().T

    for e in range(shape.experts):
        rows, k = (experts == e).nonzero(as_tuple=True)
        if len(rows):
            y.index_add_(0, rows, ffn(wide[rows], weights.gate_up[e], weights.down[e]) * chosen[rows, k, None])
    if weights.shared_gate_up is not None and weights.shared_down is not None:
        y += ffn(wide, weights.shared_gate_up, weights.shared_down)
    return y


@dataclasses.dataclass(frozen=True)
class Moec:
    """moec's layer; its kernel and library; its packed weights [E+s, panels, elements]."""

    layer: Layer
    kernel: str
    packed: tuple[Tensor, Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)


def moec_layer(shape: Shape, weights: Weights, level: str, cache_dir: Path, format: str = "") -> Moec:
    """moec as its engines run it: router and gate in one kernel (with many tokens ATen's linear and the gate kernel),
    then the whole-layer experts kernel.

    format: of the expert weights (passes/ir/formats.py), "" as they are. Raises: ValueError: no kernel takes it.
    """
    from moec.compiler.codegen.llvm import build_library
    from moec.compiler.kernels.experts.call import symbol
    from moec.compiler.kernels.experts.catalogue import SPECS
    from moec.compiler.kernels.gate import gate as gate_kernel
    from moec.compiler.kernels.gate import gate_linear as gate_linear_kernel
    from moec.compiler.kernels.gate.problem import GateProblem
    from moec.compiler.kernels.spec import ExpertsProblem
    from moec.passes.ir.gate import GateSpec
    from moec.runtime.launch.cpu import load_library
    from moec.runtime.launch.cpu_features import LEVELS

    name = str(weights.router.dtype).removeprefix("torch.")
    formats = {"format_up": format, "format_down": format}
    sizes = (shape.hidden, shape.inner, shape.experts, shape.top_k, shape.num_shared)
    problem = ExpertsProblem(*sizes, "silu", name, **formats)
    spec = next((s for s in SPECS if s.refusal(problem, LEVELS[level]) is None), None)
    if spec is None or spec.build is None:
        raise ValueError(f"no kernel of {level} takes {shape.name} in {format or name}")
    gate_spec = GateSpec(shape.top_k, renormalise=shape.renormalise).encode()
    gate_problem = GateProblem(gate_spec, shape.experts, shape.router_dtype)
    router_problem = dataclasses.replace(gate_problem, hidden=shape.hidden, x_dtype=name, weight_dtype=name)
    functions = {
        **spec.build(problem),
        **gate_kernel.build(gate_problem, spec.level),
        **gate_linear_kernel.build(router_problem, spec.level),
    }
    built = build_library(functions, spec.level, cache_dir)
    library = load_library(built.path, built.level)
    kernel, gate = library[symbol(problem)], library[gate_kernel.symbol(gate_problem)]
    gate_linear = library[gate_linear_kernel.symbol(router_problem)]
    packed = pack_weights(problem, weights)
    router = weights.router.to(getattr(torch, shape.router_dtype))
    workspace, most_tokens = torch.empty(0, dtype=torch.uint8), 0

    def layer(x: Tensor) -> Tensor:
        nonlocal workspace, most_tokens
        num_tokens = x.shape[0]
        if num_tokens > most_tokens:  # as an engine has it: made once, for the most tokens
            workspace, most_tokens = empty_huge((spec.workspace_bytes(problem, num_tokens),), torch.uint8), num_tokens
        chosen = torch.empty(num_tokens, shape.top_k)
        experts = torch.empty(num_tokens, shape.top_k, dtype=torch.int32)
        if num_tokens <= FEW_TOKENS:
            gate_linear(x, weights.router, torch.empty(num_tokens, shape.experts), chosen, experts)
        else:
            gate(router_logits(shape, router, x), chosen, experts)
        y = torch.empty_like(x)
        kernel(x, chosen, experts, *packed, workspace, y)
        return y

    return Moec(layer, spec.name, packed)


def pack_weights(problem: object, weights: Weights) -> tuple[Tensor, Tensor]:
    """gate_up and down in the kernels' layout, on huge pages; experts that are copies are packed once."""
    from moec.compiler.kernels.experts.call import pack_stack, weight_layout

    name = weight_layout(problem)
    made = []
    for stack, format, gated in (
        (weights.gate_up, problem.format_up, True),
        (weights.down, problem.format_down, None),
    ):
        few = pack_stack(format, stack[:DISTINCT_EXPERTS], name, gated)
        out = empty_huge((len(stack), *few.shape[1:]), few.dtype)
        for e in range(len(stack)):
            out[e] = few[e % DISTINCT_EXPERTS]
        made.append(out)
    return made[0], made[1]


class StreamingRead:
    """A plain read of what a call of moec must read: the packed weights of the experts that the tokens take.

    choose(x) comes before the call, and is not timed: a read has no router.
    """

    def __init__(self, shape: Shape, weights: Weights, moec: Moec, cache_dir: Path) -> None:
        from moe_stream import build_stream

        self._shape, self._weights, self._read = shape, weights, build_stream(cache_dir)
        self._flat = [p.view(torch.uint8).flatten().view(torch.int32) for p in moec.packed]
        self._sums = torch.zeros(64, dtype=torch.int32)
        self._used = torch.empty(0, dtype=torch.int32)

    def choose(self, x: Tensor) -> None:
        """Looks which experts the tokens x [T,H] take."""
        shape = self._shape
        shared = torch.arange(shape.experts, shape.experts + shape.num_shared)
        self._used = torch.cat([route(shape, self._weights, x)[1].unique(), shared]).to(torch.int32)

    def __call__(self, x: Tensor) -> Tensor:
        for buffer in self._flat:
            self._sums.zero_()
            self._read(buffer, self._used, self._sums, buffer.numel() // (self._shape.experts + self._shape.num_shared))
        return x


def transformers_module(shape: Shape, weights: Weights, implementation: str) -> torch.nn.Module:
    """transformers' own MoE block of the model, on the given weights. implementation: eager, batched_mm, grouped_mm."""
    import transformers as hf
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    h, f, e, k = shape.hidden, shape.inner, shape.experts, shape.top_k
    with torch.device("meta"):
        if shape.shared:
            config = hf.DeepseekV2Config(
                hidden_size=h, moe_intermediate_size=f, n_routed_experts=e, num_experts_per_tok=k, mlp_bias=False,
                n_shared_experts=shape.num_shared, topk_method="greedy", routed_scaling_factor=1.0, n_group=1,
                topk_group=1, norm_topk_prob=shape.renormalise,
            )  # fmt: skip
            kind: type = DeepseekV2Moe
        elif shape.name.startswith("qwen3"):
            config = hf.Qwen3MoeConfig(
                hidden_size=h, moe_intermediate_size=f, num_experts=e, num_experts_per_tok=k,
                norm_topk_prob=shape.renormalise,
            )  # fmt: skip
            kind = Qwen3MoeSparseMoeBlock
        else:
            config = hf.MixtralConfig(hidden_size=h, intermediate_size=f, num_local_experts=e, num_experts_per_tok=k)
            kind = MixtralSparseMoeBlock
        config._experts_implementation = implementation
        module = kind(config)

    def parameter(t: Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(t, requires_grad=False)

    module.gate.weight = parameter(weights.router)
    module.experts.gate_up_proj, module.experts.down_proj = parameter(weights.gate_up[:e]), parameter(weights.down[:e])
    if weights.shared_gate_up is not None and weights.shared_down is not None:
        shared = module.shared_experts
        shared.gate_proj.weight = parameter(weights.shared_gate_up[: shape.shared])
        shared.up_proj.weight = parameter(weights.shared_gate_up[shape.shared :])
        shared.down_proj.weight = parameter(weights.shared_down)
    return module.eval()


def transformers_layer(shape: Shape, weights: Weights, implementation: str, compiled: bool) -> Layer:
    """A transformers block as a layer, through torch.compile where asked."""
    module = transformers_module(shape, weights, implementation)
    if compiled:
        torch._dynamo.reset()
        module = torch.compile(module, dynamic=False)
    return lambda x: module(x[None])[0]
