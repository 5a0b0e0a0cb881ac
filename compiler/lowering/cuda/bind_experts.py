"""Sites of expert layers on a GPU: dispatch, the two grouped GEMMs and the weighted sum, for few tokens and for many.

Beside these, for up to 16 tokens, the whole layer with its router in one launch (bind_decode.py); and, where the user
asked for `--combine fast`, sums by atomics. All read the same weights (site_shape.py): each range of T takes its best.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moec.compiler.codegen.cuda_archs import Architecture
from moec.compiler.kernels.cuda.dispatch import CHUNK
from moec.compiler.kernels.cuda.kernel import CudaKernel
from moec.compiler.kernels.cuda.layer import LayerError, LayerKernels
from moec.compiler.kernels.spec import Cost, ExpertsProblem
from moec.compiler.lowering import bind_stored
from moec.compiler.lowering.bind_experts import Layer
from moec.compiler.lowering.candidates import Candidate, Results, Site
from moec.compiler.lowering.cuda.bind_decode import decode_candidate
from moec.compiler.lowering.cuda.cost import CACHE_PART, kernel_us, library_us
from moec.compiler.lowering.cuda.launches import MULTIPROCESSORS, candidate, launch, named, numbers, refused, rows_of
from moec.compiler.lowering.cuda.launches import size as sized
from moec.compiler.lowering.cuda.launches import times as multiplied
from moec.compiler.lowering.cuda.site_shape import (
    E4M3,
    bytes_per_value,
    experts_in_use,
    shape_of,
    stack_arguments,
    values_per_expert,
    weights_of,
)
from moec.compiler.lowering.writer import Writer
from moec.runtime.expressions import Size
from moec.runtime.program import Step

SIZES = {"small": "few", "large": "many"}
"""The two ways of compiler/kernels/cuda/layer.py, and what part of the peak the cost model gives them."""
ATOMIC_TOKENS = 256
"""Most tokens of atomic sums: their memory is kept at zero between steps, and more tokens gain little."""


def experts_site(
    layer: Layer, arch: Architecture, library: Callable[[Layer, ExpertsProblem], Candidate], fast_combine: bool = False
) -> Site:
    """The site of one layer. library: makes the candidate that goes expert by expert.

    fast_combine: the last bits may differ from run to run.
    """
    formats = bind_stored.formats_at(layer.w_gate_up) + bind_stored.formats_at(layer.w_down)
    plain = bind_stored.experts_candidates(layer, library(layer, layer.problem), [])[0]
    reason, dtype = weights_of(layer)
    slow = dataclasses.replace(plain, predict=lambda t: _library_us(layer, arch, t))
    kernels = [_candidate(layer, arch, dtype, size, reason) for size in SIZES]
    if any(k.refused is None for k in kernels):
        waits, twice = "the host would wait for the device, no graphs", "the weights would be stored a second time"
        slow = refused(slow.name, twice if formats else waits)
    if fast_combine:
        kernels.append(_candidate(layer, arch, dtype, "small", reason, atomic=True))
    kernels.append(decode_candidate(layer, arch, dtype, reason))
    return Site(layer.node, (slow, *kernels), layer.covers, shape_of(layer, dtype))


def _candidate(
    layer: Layer,
    arch: Architecture,
    dtype: str,
    size: str,
    reason: str | None,
    atomic: bool = False,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Candidate:
    """configs: of the two GEMMs, in the place of the default tiles."""
    name = f"cuda-experts-{size}{'-atomic' if atomic else ''}"
    shape = shape_of(layer, dtype, atomic)
    try:
        made = shape.kernels(arch, size, configs) if reason is None else None
    except LayerError as error:
        reason, made = str(error), None
    if made is None:
        return refused(name, reason or "")
    ordered = dataclasses.replace(shape, atomic=False)  # only down differs: the others are the same kernels
    chosen = repr(configs) if configs else size
    kernels = {role: named(k, shape if role == "down" else ordered, chosen) for role, k in made.kernels.items()}
    writes = _Layer(layer, made, kernels)

    def predict(tokens: int) -> float:
        if atomic and tokens > ATOMIC_TOKENS:
            return float("inf")
        return _kernels_us(layer, arch, made, size, tokens)

    plain = candidate(f"{name}-tuned" if configs else name, predict, writes.write, list(kernels.values()))
    if atomic or configs:
        return plain

    def configured(config: Mapping[str, Any]) -> Candidate:
        return _candidate(layer, arch, dtype, size, reason, configs=config) if config else plain

    return dataclasses.replace(plain, configured=configured)


def _kernels_us(layer: Layer, arch: Architecture, made: LayerKernels, size: str, tokens: int) -> float:
    """What is over a multiple of a block's rows is computed in vain.

    Every block of rows reads its expert's weights; those of one expert run side by side and share them in the L2 cache.
    """
    p, used = layer.problem, experts_in_use(layer, tokens)
    slots = tokens * (p.top_k + p.num_shared)
    tiles = used * max(1.0, slots / used / made.tile_rows)
    reads = max(used, tiles / CACHE_PART)
    num_bytes = reads * values_per_expert(layer) * bytes_per_value(layer) + tokens * p.hidden * 4
    ends = "finish" if "finish" in made.kernels else "combine"
    sums = tokens if ends == "finish" else slots * made.splits  # rows that down writes and the last kernel reads
    num_bytes += 2 * sums * p.hidden * getattr(torch, made.part_dtype).itemsize
    dtype = "fp8" if made.shape.dtype == E4M3 else "bf16"
    cost = Cost(int(num_bytes), int(2 * tiles * made.tile_rows * values_per_expert(layer)))
    return kernel_us(arch, cost, len(made.kernels) - 2, SIZES[size], dtype)


def _library_us(layer: Layer, arch: Architecture, tokens: int) -> float:
    """Expert by expert: the host waits for the counts, then launches some six kernels for each expert in use."""
    p, used, values = layer.problem, experts_in_use(layer, tokens), values_per_expert(layer)
    slots = tokens * (p.top_k + p.num_shared)
    return library_us(arch, Cost(int(used * values * 2), 2 * slots * values), 12 + 6 * used, True)


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
        weighing = {"weights": route}
        if layer.shared_weight is not None:
            weighing["shared_weight"] = numbers(writer, layer.shared_weight, torch.float32)
        x, x_scale, x_rows = self._operand(writer, "gather", x, rows, slots, order | weighing)
        h = writer.scratch(f"{node.name}_h", "bfloat16", (slots, self.made.shape.inner))
        self._gemm(writer, "gate_up", x, x_scale, x_rows, h, slots, order)
        h, h_scale, _ = self._operand(writer, "quantise_h", h, slots, slots, {})
        ending = {"experts": index, "y": {"buffer": results[0]}, "n": sized(rows)} | weighing
        splits, part_dtype, hidden = self.made.splits, self.made.part_dtype, self.made.shape.hidden
        if "finish" in self.kernels:
            sums = writer.zeros("expert_sums", "float32", (ATOMIC_TOKENS, hidden))
            self._gemm(writer, "down", h, h_scale, slots, sums, slots, order | weighing | {"n": sized(rows)})
            launch(writer, self.kernels["finish"], node, ending | {"sums": sums}, results)
            return
        part = writer.scratch(f"{node.name}_part", part_dtype, (multiplied(slots, splits), hidden))
        self._gemm(writer, "down", h, h_scale, slots, part, slots, order)
        launch(writer, self.kernels["combine"], node, ending | {"part": part}, results)

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
        values = order | {"x": source, "y": made, "x_rows": sized(rows), "rows": sized(made_rows)}
        scale = None
        if shape.dtype == E4M3:
            scale = values["scale"] = writer.scratch(f"{node.name}_{role}_scale", "float32", (made_rows,))
        launch(writer, self.kernels[role], node, values, [b["buffer"] for b in (made, scale) if b is not None])
        return made, scale, made_rows

    def _gemm(
        self, writer: Writer, role: str, x: Any, x_scale: Any, x_rows: Size, y: Any, slots: Size, order: dict[str, Any]
    ) -> None:
        layer = self.layer
        stack, bias = (layer.w_gate_up, layer.b_gate_up) if role == "gate_up" else (layer.w_down, layer.b_down)
        values = {"x": x, "y": y, "x_rows": sized(x_rows), "blocks": MULTIPROCESSORS, **order}
        values |= stack_arguments(writer, stack, self.made.shape.dtype)
        if x_scale is not None:
            values["x_scale"] = x_scale
        if bias is not None:
            values["bias"] = numbers(writer, bias, torch.float32)
        launch(writer, self.kernels[role], layer.node, values, [y["buffer"]])
