"""What the ways of an expert layer share on a GPU: its shape as kernels see it, its stacks as they read them, bytes.

All ways read the stacks in one layout, so no weight is stored twice: bf16 as the op has them, fp8-w8a8 as codes
e4m3[E,N,K] and scales f32[E,N] (activations are rounded too), int8 and int4 packed by codes.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from moec.compiler.codegen.cuda_archs import Architecture
from moec.compiler.kernels.cuda import codes, combine, combine_fast, rows
from moec.compiler.kernels.cuda.combine import CombineProblem
from moec.compiler.kernels.cuda.combine_fast import FinishProblem
from moec.compiler.kernels.cuda.dispatch import DispatchProblem
from moec.compiler.kernels.cuda.dispatch import refusal as dispatch_refusal
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem
from moec.compiler.kernels.cuda.kernel import CudaKernel
from moec.compiler.kernels.cuda.layer import LayerError, LayerKernels, LayerShape, layer_kernels
from moec.compiler.kernels.cuda.rows import RowsProblem
from moec.compiler.lowering import bind_stored
from moec.compiler.lowering.bind_experts import Layer
from moec.compiler.lowering.packing import cuda_codes, cuda_scales, e4m3_codes, e4m3_scales
from moec.compiler.lowering.writer import Writer
from moec.passes.ir.activation import Activation
from moec.passes.ir.formats import WeightFormat

E4M3 = "float8_e4m3fn"


@dataclasses.dataclass(frozen=True)
class SiteShape(LayerShape):
    """A layer as the graph has it.

    has_bias: of the experts.  has_shared_weight: of the shared ones, for each token.  weight_on_input: the routing's
    weights multiply the experts' input.  atomic: down adds to the sums itself, in no fixed order.
    """

    has_bias: bool = False
    has_shared_weight: bool = False
    weight_on_input: bool = False
    atomic: bool = False

    def gemm(self, mode: str, part_dtype: str) -> GemmProblem:
        """See LayerShape. Weighted input lies in the order of slots."""
        weighted = self.weight_on_input and mode == "gate_up"
        problem = dataclasses.replace(super().gemm(mode, part_dtype), has_bias=self.has_bias, in_slot_order=weighted)
        if not self.atomic or mode != "down":
            return problem
        return dataclasses.replace(
            problem, reduce=True, num_shared=self.num_shared, has_shared_weight=self.has_shared_weight
        )

    def kernels(
        self, arch: Architecture, size: str, configs: Mapping[str, Mapping[str, Any]] | None = None
    ) -> LayerKernels:
        """The launches after the gate, by role. size, configs: as layer_kernels. Raises: LayerError."""
        if self.atomic and self.weight_on_input:
            raise LayerError("the weights of the routing are in the input; atomic sums apply them to the output")
        made = layer_kernels(self, arch.name, size, configs)
        kernels = {role: kernel for role, kernel in made.kernels.items() if role not in ("gate", "combine")}
        kernels |= self._gathering(arch) | self._ending(arch, made)
        reasons = (RowsProblem(width, 1).refusal() for width in (self.hidden, self.inner))
        if reason := next((r for r in reasons if r), None):
            raise LayerError(reason)
        return dataclasses.replace(made, gathers=made.gathers or self.weight_on_input, kernels=kernels)

    def _gathering(self, arch: Architecture) -> dict[str, CudaKernel]:
        """What brings weighted rows into the order of slots, in the place of a plain gather."""
        if not self.weight_on_input:
            return {}
        problem = RowsProblem(
            self.hidden, self.slots_per_token, self.dtype == E4M3, weighted=True, num_shared=self.num_shared,
            has_shared_weight=self.has_shared_weight,
        )  # fmt: skip
        return {"gather": CudaKernel("gather", arch.name, lambda: rows.build(problem))}

    def _ending(self, arch: Architecture, made: LayerKernels) -> dict[str, CudaKernel]:
        """What makes y of the rows or sums of down. Raises: LayerError."""
        if self.atomic:
            finish = FinishProblem(self.hidden)
            if reason := finish.refusal():
                raise LayerError(reason)
            return {"finish": CudaKernel("finish", arch.name, lambda: combine_fast.build(finish))}
        sums = CombineProblem(
            self.hidden, self.num_experts, self.top_k, self.num_shared, made.splits, made.part_dtype,
            self.has_shared_weight and not self.weight_on_input, weighted=not self.weight_on_input,
        )  # fmt: skip
        if reason := sums.refusal():
            raise LayerError(reason)
        return {"combine": CudaKernel("combine", arch.name, lambda: combine.build(sums))}


def shape_of(layer: Layer, dtype: str, atomic: bool = False) -> SiteShape:
    """dtype: of weights_of."""
    p = layer.problem
    return SiteShape(
        "", p.hidden, p.inner, p.num_experts, p.top_k, "", p.num_shared, p.act, dtype, has_bias=p.has_bias,
        has_shared_weight=p.has_shared_weight, weight_on_input=p.weight_on_input, atomic=atomic,
    )  # fmt: skip


def weights_of(layer: Layer) -> tuple[str | None, str]:
    """Why no CUDA kernel takes the layer, or None; and the dtype of its operands, or the format of its codes."""
    formats = bind_stored.formats_at(layer.w_gate_up) + bind_stored.formats_at(layer.w_down)
    problem, names = layer.problem, {f.name for f in formats}
    dtype = "bfloat16" if not formats else E4M3 if names == {"fp8-w8a8"} else "+".join(sorted(names))
    if problem.dtype != "bfloat16":
        return f"x in {problem.dtype}, only bfloat16 is built", dtype
    if formats and dtype != E4M3 and (reason := _codes_refusal(layer, formats)):
        return reason, dtype
    if any(n is not None and n.op != "get_attr" for n in layer.stacks):
        return "the weights are computed by the graph", dtype
    if not formats and any(n.meta["val"].dtype != torch.bfloat16 for n in (layer.w_gate_up, layer.w_down)):
        return "weights in another dtype than x", dtype
    return dispatch_refusal(DispatchProblem(problem.num_experts, problem.top_k, problem.num_shared)), dtype


def _codes_refusal(layer: Layer, formats: tuple[WeightFormat, ...]) -> str | None:
    """Why weights that are codes are not what gemm_codes.py reads, or None."""
    if len(formats) != 2 or len({f.name for f in formats}) != 1:
        found = ", ".join(dict.fromkeys(f.name for f in formats))
        return f"weights in {found}; both stacks, and all their experts, have one format where kernels are built"
    shapes = [w.meta["val"].shape for w in (layer.w_gate_up, layer.w_down)]
    reasons = (codes.refusal(f, int(s[1]), int(s[2])) for f, s in zip(formats, shapes, strict=True))
    return next((r for r in reasons if r), None)


def stack_arguments(writer: Writer, stack: fx.Node, dtype: str) -> dict[str, Any]:
    """w, and w_scale where there are scales, of one of the two stacks. dtype: of weights_of."""
    if dtype == "bfloat16":
        return {"w": writer.dense(stack, whole=True)}
    weight = writer.weight_of(stack)
    assert weight is not None  # weights_of
    w, scale = (e4m3_codes, e4m3_scales) if dtype == E4M3 else (cuda_codes, cuda_scales)
    return {
        "w": writer.weight(f"{stack.target}_{'e4m3' if dtype == E4M3 else 'codes'}", w(weight)),
        "w_scale": writer.weight(f"{stack.target}_scale", scale(weight)),
    }


def experts_in_use(layer: Layer, tokens: int) -> float:
    """Experts that tokens reach, spread evenly."""
    p = layer.problem
    return p.num_experts * (1 - (1 - p.top_k / p.num_experts) ** tokens) + p.num_shared


def values_per_expert(layer: Layer) -> int:
    """Of its weights."""
    p = layer.problem
    return p.hidden * p.inner * (3 if Activation.parse(p.act).gated else 2)


def bytes_per_value(layer: Layer) -> float:
    """Of the stored weights, scales left out."""
    formats = bind_stored.formats_at(layer.w_gate_up)
    return formats[0].bits / 8 if formats else 2
