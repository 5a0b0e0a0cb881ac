"""Sites of expert layers on a GPU: dispatch, the two grouped GEMMs and the weighted sum, for few tokens and for many.

Both read the stacks in one layout, so they share the range of T and no weight is stored twice: bf16 as the op has them,
fp8-w8a8 as codes e4m3[E,N,K] and scales f32[E,N] (activations are rounded too), int8 and int4 packed by codes.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from moec.compiler.codegen.cuda_archs import Architecture
from moec.compiler.kernels.cuda import codes, combine
from moec.compiler.kernels.cuda.combine import CombineProblem
from moec.compiler.kernels.cuda.dispatch import CHUNK, DispatchProblem
from moec.compiler.kernels.cuda.dispatch import refusal as dispatch_refusal
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem
from moec.compiler.kernels.cuda.kernel import CudaKernel
from moec.compiler.kernels.cuda.layer import LayerError, LayerKernels, LayerShape, layer_kernels
from moec.compiler.kernels.cuda.rows import RowsProblem
from moec.compiler.kernels.spec import Cost, ExpertsProblem
from moec.compiler.lowering import bind_stored
from moec.compiler.lowering.bind_experts import Layer
from moec.compiler.lowering.candidates import Candidate, Results, Site
from moec.compiler.lowering.cuda.cost import kernel_us, library_us
from moec.compiler.lowering.cuda.launches import MULTIPROCESSORS, candidate, launch, named, numbers, refused, rows_of
from moec.compiler.lowering.cuda.launches import size as sized
from moec.compiler.lowering.cuda.launches import times as multiplied
from moec.compiler.lowering.packing import cuda_codes, cuda_scales, e4m3_codes, e4m3_scales
from moec.compiler.lowering.writer import Writer
from moec.passes.ir.activation import Activation
from moec.passes.ir.formats import WeightFormat
from moec.runtime.expressions import Size
from moec.runtime.program import Step

E4M3 = "float8_e4m3fn"
SIZES = {"small": "few", "large": "many"}
"""The two ways of compiler/kernels/cuda/layer.py, and what part of the peak the cost model gives them."""


@dataclasses.dataclass(frozen=True)
class SiteShape(LayerShape):
    """A layer as the graph has it: with biases of the experts, and a weight of the shared ones for each token."""

    has_bias: bool = False
    has_shared_weight: bool = False

    def gemm(self, mode: str, part_dtype: str) -> GemmProblem:
        return dataclasses.replace(super().gemm(mode, part_dtype), has_bias=self.has_bias)

    def kernels(self, arch: Architecture, size: str) -> LayerKernels:
        """Raises: LayerError."""
        made = layer_kernels(self, arch.name, size)
        sums = CombineProblem(
            self.hidden, self.num_experts, self.top_k, self.num_shared, made.splits, made.part_dtype,
            self.has_shared_weight,
        )  # fmt: skip
        reason = sums.refusal() or next((r for width in (self.hidden, self.inner) if (r := _rows_refusal(width))), None)
        if reason:
            raise LayerError(reason)
        own = dataclasses.replace(made.kernels["combine"], build=lambda: combine.build(sums))
        return dataclasses.replace(
            made, kernels={k: v for k, v in made.kernels.items() if k != "gate"} | {"combine": own}
        )


def _rows_refusal(width: int) -> str | None:
    return RowsProblem(width, 1).refusal()


def experts_site(layer: Layer, arch: Architecture, library: Callable[[Layer, ExpertsProblem], Candidate]) -> Site:
    """The site of one layer. library: makes the candidate that goes expert by expert."""
    formats = bind_stored.formats_at(layer.w_gate_up) + bind_stored.formats_at(layer.w_down)
    plain = bind_stored.experts_candidates(layer, library(layer, layer.problem), [])[0]
    reason, dtype = _refusal(layer, formats)
    slow = dataclasses.replace(plain, predict=lambda t: _library_us(layer, arch, t))
    kernels = [_candidate(layer, arch, dtype, size, reason) for size in SIZES]
    if formats and any(k.refused is None for k in kernels):
        slow = refused(slow.name, "the weights would be stored a second time, in another layout")
    return Site(layer.node, (slow, *kernels), layer.covers)


def _codes_refusal(layer: Layer, formats: tuple[WeightFormat, ...]) -> str | None:
    """Why weights that are codes are not what gemm_codes.py reads, or None."""
    if len(formats) != 2 or len({f.name for f in formats}) != 1:
        found = ", ".join(dict.fromkeys(f.name for f in formats))
        return f"weights in {found}; both stacks, and all their experts, have one format where kernels are built"
    shapes = [w.meta["val"].shape for w in (layer.w_gate_up, layer.w_down)]
    reasons = (codes.refusal(f, int(s[1]), int(s[2])) for f, s in zip(formats, shapes, strict=True))
    return next((r for r in reasons if r), None)


def _refusal(layer: Layer, formats: tuple[WeightFormat, ...]) -> tuple[str | None, str]:
    """Why no CUDA kernel takes the layer, or None; and the dtype of its operands, or the format of its codes."""
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
    if layer.weight_on_input:
        return "the weights of the routing are applied to the input", dtype
    return dispatch_refusal(DispatchProblem(problem.num_experts, problem.top_k, problem.num_shared)), dtype


def _candidate(layer: Layer, arch: Architecture, dtype: str, size: str, reason: str | None) -> Candidate:
    p, name = layer.problem, f"cuda-experts-{size}"
    shape = SiteShape(
        "", p.hidden, p.inner, p.num_experts, p.top_k, "", p.num_shared, p.act, dtype,
        has_bias=p.has_bias, has_shared_weight=p.has_shared_weight,
    )  # fmt: skip
    try:
        made = shape.kernels(arch, size) if reason is None else None
    except LayerError as error:
        reason, made = str(error), None
    if made is None:
        return refused(name, reason or "")
    kernels = {role: named(kernel, shape, size) for role, kernel in made.kernels.items()}
    writes = _Layer(layer, made, kernels)
    return candidate(name, lambda t: _kernels_us(layer, arch, made, size, t), writes.write, list(kernels.values()))


def _used(layer: Layer, tokens: int) -> float:
    """Experts that tokens reach, spread evenly."""
    p = layer.problem
    return p.num_experts * (1 - (1 - p.top_k / p.num_experts) ** tokens) + p.num_shared


def _values(layer: Layer) -> int:
    """Of one expert's weights."""
    p = layer.problem
    return p.hidden * p.inner * (3 if Activation.parse(p.act).gated else 2)


def _kernels_us(layer: Layer, arch: Architecture, made: LayerKernels, size: str, tokens: int) -> float:
    """A block of rows reads its expert's weights; what is over a multiple of its rows is computed in vain."""
    p, used = layer.problem, _used(layer, tokens)
    tiles = used * max(1.0, tokens * (p.top_k + p.num_shared) / used / made.tile_rows)
    formats = bind_stored.formats_at(layer.w_gate_up)
    num_bytes = tiles * _values(layer) * (formats[0].bits / 8 if formats else 2) + tokens * p.hidden * 4
    dtype = "fp8" if made.shape.dtype == E4M3 else "bf16"
    cost = Cost(int(num_bytes), int(2 * tiles * made.tile_rows * _values(layer)))
    return kernel_us(arch, cost, len(made.kernels) - 2, SIZES[size], dtype)


def _library_us(layer: Layer, arch: Architecture, tokens: int) -> float:
    """Expert by expert: the host waits for the counts, then launches some six kernels for each expert in use."""
    p, used = layer.problem, _used(layer, tokens)
    slots = tokens * (p.top_k + p.num_shared)
    return library_us(arch, Cost(int(used * _values(layer) * 2), 2 * slots * _values(layer)), 12 + 6 * used, True)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Writes the launches of a layer. kernels: by role, as compiler/kernels/cuda/layer.py calls them."""

    layer: Layer
    made: LayerKernels
    kernels: dict[str, CudaKernel]

    def write(self, writer: Writer, results: Results) -> None:
        """See Write."""
        layer, node = self.layer, self.layer.node
        rows = rows_of(writer, layer.x)
        slots = multiplied(rows, self.made.shape.slots_per_token)
        x = numbers(writer, layer.x, torch.bfloat16)
        route = numbers(writer, layer.weights, torch.float32)
        index = numbers(writer, layer.experts, torch.int32)
        order = self._dispatch(writer, index, rows, slots)
        x, x_scale, x_rows = self._operand(writer, "gather", x, rows, slots, order)
        h = writer.scratch(f"{node.name}_h", "bfloat16", (slots, self.made.shape.inner))
        self._gemm(writer, "gate_up", x, x_scale, x_rows, h, slots, order)
        h, h_scale, _ = self._operand(writer, "quantise_h", h, slots, slots, {})
        splits, part_dtype = self.made.splits, self.made.part_dtype
        part = writer.scratch(f"{node.name}_part", part_dtype, (multiplied(slots, splits), self.made.shape.hidden))
        self._gemm(writer, "down", h, h_scale, slots, part, slots, order)
        values = {"part": part, "weights": route, "experts": index, "y": {"buffer": results[0]}, "n": sized(rows)}
        if layer.shared_weight is not None:
            values["shared_weight"] = numbers(writer, layer.shared_weight, torch.float32)
        launch(writer, self.kernels["combine"], node, values, results)

    def _dispatch(self, writer: Writer, index: Any, rows: Size, slots: Size) -> dict[str, Any]:
        """The order of slots and the map of tiles, as arguments of the GEMMs."""
        node, shape = self.layer.node, self.made.shape
        stacked = shape.num_experts + shape.num_shared
        tiles: Size = (
            min(slots, slots // self.made.tile_rows + stacked)
            if isinstance(slots, int)
            else f"min({slots}, ({slots})//{self.made.tile_rows} + {stacked})"
        )
        order = {
            name: writer.scratch(f"{node.name}_{name}", "int32", (length,))
            for name, length in (
                ("slot_order", slots),
                ("expert_start", stacked + 1),
                ("tile_expert", slots),
                ("tile_row", slots),
            )
        }
        counts = writer.scratch(f"{node.name}_counts", "int32", (rows, stacked + 1))
        chunks: Size = -(-slots // CHUNK) if isinstance(slots, int) else f"({slots} + {CHUNK - 1})//{CHUNK}"
        values = {"experts": index, "counts": counts, **order}
        values |= {"n": sized(rows), "chunks": sized(chunks), "tiles": sized(tiles)}
        filled = [b["buffer"] for b in order.values()]

        def several() -> None:
            launch(writer, self.kernels["count"], node, values, [counts["buffer"]])
            launch(writer, self.kernels["place_chunks"], node, values, filled)

        most = CHUNK // shape.slots_per_token  # tokens whose slots one block sorts
        symbol = str(rows).strip("()")
        if isinstance(rows, int) or not symbol.isidentifier():
            several()
        else:
            outer, writer.steps = writer.steps, []
            launch(writer, self.kernels["place"], node, values, filled)
            few, writer.steps = tuple(writer.steps), []
            several()
            many, writer.steps = tuple(writer.steps), outer
            outer.append(Step("choose", "", node.name, symbol=symbol, variants=((most, few), (None, many))))
        return order | {"slots": sized(slots), "tiles": sized(tiles)}

    def _operand(
        self, writer: Writer, role: str, source: Any, rows: Size, slots: Size, order: dict[str, Any]
    ) -> tuple[Any, Any, Size]:
        """The rows that a GEMM reads: gathered, in e4m3, both or as they are -> rows, their scales, their number."""
        if role not in self.kernels:
            return source, None, rows
        node, shape, gathers = self.layer.node, self.made.shape, role == "gather" and self.made.gathers
        width = shape.hidden if role == "gather" else shape.inner
        made_rows = slots if gathers else rows
        made = writer.scratch(f"{node.name}_{role}", shape.dtype, (made_rows, width))
        values = {"x": source, "y": made, "x_rows": sized(rows), "rows": sized(made_rows)}
        scale = None
        if shape.dtype == E4M3:
            scale = values["scale"] = writer.scratch(f"{node.name}_{role}_scale", "float32", (made_rows,))
        if gathers:
            values["slot_order"] = order["slot_order"]
        launch(writer, self.kernels[role], node, values, [b["buffer"] for b in (made, scale) if b is not None])
        return made, scale, made_rows

    def _gemm(
        self, writer: Writer, role: str, x: Any, x_scale: Any, x_rows: Size, y: Any, slots: Size, order: dict[str, Any]
    ) -> None:
        layer = self.layer
        stack, bias = (layer.w_gate_up, layer.b_gate_up) if role == "gate_up" else (layer.w_down, layer.b_down)
        values = {"x": x, "y": y, "x_rows": sized(x_rows), "blocks": MULTIPROCESSORS, **order}
        if self.made.shape.dtype == "bfloat16":
            values["w"] = writer.dense(stack, whole=True)
        else:
            weight = writer.weight_of(stack)
            assert weight is not None  # _refusal
            by_e4m3 = self.made.shape.dtype == E4M3
            w, scale = (e4m3_codes, e4m3_scales) if by_e4m3 else (cuda_codes, cuda_scales)
            values["w"] = writer.weight(f"{stack.target}_{'e4m3' if by_e4m3 else 'codes'}", w(weight))
            values["w_scale"] = writer.weight(f"{stack.target}_scale", scale(weight))
        if x_scale is not None:
            values["x_scale"] = x_scale
        if bias is not None:
            values["bias"] = numbers(writer, bias, torch.float32)
        launch(writer, self.kernels[role], layer.node, values, [y["buffer"]])
