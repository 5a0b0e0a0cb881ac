"""The whole expert layer for up to 16 tokens in one cooperative launch: router, gate, GEMMs and sum (moe_decode.py).

It does the work of the layer's gate_linear too, so that site does nothing in the same range of T (Candidate.absorbs);
what the gate chose is a result of the launch. Predicted is what it takes beyond the router's best way on its own, which
the other ways of the layer need beside them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moec.compiler.codegen.cuda_archs import Architecture
from moec.compiler.kernels.cuda import gate_linear, moe_decode
from moec.compiler.kernels.cuda.moe_decode import BLOCKS_PER_SM, MAX_TOKENS, DecodeProblem
from moec.compiler.kernels.spec import Cost
from moec.compiler.lowering.bind_experts import Layer
from moec.compiler.lowering.bind_layers import gate_problem
from moec.compiler.lowering.candidates import Candidate, Results
from moec.compiler.lowering.cuda.bind_layers import gate_linear_site
from moec.compiler.lowering.cuda.cost import BARRIER_US, SLOT_US, kernel_us, router_us
from moec.compiler.lowering.cuda.launches import absorbing, launch, named, numbers, refused, rows_of, size, times
from moec.compiler.lowering.cuda.site_shape import (
    SiteShape,
    bytes_per_value,
    experts_in_use,
    shape_of,
    stack_arguments,
    values_per_expert,
)
from moec.compiler.lowering.writer import Writer, arguments
from moec.passes.ir import ops

NAME = "cuda-moe-decode"
BARRIERS = 3


def decode_candidate(layer: Layer, arch: Architecture, dtype: str, reason: str | None) -> Candidate:
    """reason: why no CUDA kernel takes the layer.  dtype: of its operands, or the format of its codes."""
    router = None if reason else _router(layer)
    if not isinstance(router, fx.Node):
        return refused(NAME, reason or router or "")
    shape = shape_of(layer, dtype)
    problem = _problem(layer, shape, router)
    tiles = moe_decode.default_tiles(problem, arch)
    if isinstance(tiles, str):
        return refused(NAME, tiles)
    kernel = named(moe_decode.decode_kernel(problem, tiles, arch.name), problem, tiles)
    a, splits = arguments(router), tiles[1].splits

    def write(writer: Writer, results: Results) -> None:
        node, rows = layer.node, rows_of(writer, layer.x)
        slots = times(rows, shape.slots_per_token)
        parts = times(slots, splits)
        values: dict[str, Any] = {"n": size(rows), "slots": size(slots), "parts": size(parts)}
        values |= {"x": numbers(writer, layer.x, torch.bfloat16), "router": writer.dense(a["w"], whole=True)}
        for name, given in (("router_bias", a["bias"]), ("selection_bias", a["selection_bias"])):
            values |= {} if given is None else {name: writer.dense(given, whole=True)}
        if layer.shared_weight is not None:
            values["shared_weight"] = numbers(writer, layer.shared_weight, torch.float32)
        stacks = (("up", layer.w_gate_up, layer.b_gate_up), ("down", layer.w_down, layer.b_down))
        for name, stack, bias in stacks:
            values |= {f"{name}_{key}": value for key, value in stack_arguments(writer, stack, dtype).items()}
            values |= {} if bias is None else {f"{name}_bias": numbers(writer, bias, torch.float32)}
        values["logits"] = writer.scratch(f"{node.name}_logits", "float32", (rows, problem.gate.num_experts))
        values["h"] = writer.scratch(f"{node.name}_decode_h", "bfloat16", (slots, shape.inner))
        values["part"] = writer.scratch(f"{node.name}_decode_part", "float32", (parts, shape.hidden))
        values["barrier"] = writer.zeros("grid_barrier", "int32", (2,))
        chosen = [writer.buffers.of(router, i) for i in range(2)]
        values |= {name: {"buffer": b} for name, b in zip(("weights", "experts"), chosen, strict=True)}
        values |= {"y": {"buffer": results[0]}, "blocks": {"multiprocessors": BLOCKS_PER_SM}}
        launch(writer, kernel, node, values, [*chosen, *results])

    return absorbing(NAME, lambda t: _decode_us(layer, router, problem, arch, t), write, kernel, router)


def _router(layer: Layer) -> fx.Node | str:
    """The gate_linear that chooses the layer's experts, if nobody else needs what it gives; else why not."""
    chosen = (layer.weights, layer.experts)
    if any(n.target is not operator.getitem for n in chosen):
        return "the weights of the routing do not come from a gate as they are"
    gates = {n.args[0] for n in chosen}
    gate = next(iter(gates))
    if len(gates) > 1 or not isinstance(gate, fx.Node) or gate.target is not ops.gate_linear._opoverload:
        return "the router is no linear layer with its gate behind it"
    if [n.args[1] for n in chosen] != [0, 1]:
        return "the weights of the routing do not come from a gate as they are"
    inside = {*layer.covers, layer.node}
    if any(user not in inside for n in gate.users for user in n.users):
        return "the routing is read elsewhere too"
    if arguments(gate)["x"] is not layer.x:
        return "the router reads another x than the experts"
    return "the weights of the routing are applied to the input" if layer.weight_on_input else gate


def _problem(layer: Layer, shape: SiteShape, router: fx.Node) -> DecodeProblem:
    return DecodeProblem(
        gate_problem(router), shape.gemm("gate_up", "float32"), shape.gemm("down", "float32"), shape.num_shared,
        shape.has_shared_weight,
    )  # fmt: skip


def _decode_us(layer: Layer, router: fx.Node, problem: DecodeProblem, arch: Architecture, tokens: int) -> float:
    """Beyond the best way of the router; infinite above MAX_TOKENS."""
    if tokens > MAX_TOKENS:
        return float("inf")
    p, gate = layer.problem, problem.gate
    used, slots = experts_in_use(layer, tokens), tokens * problem.up.slots_per_token
    num_bytes = used * values_per_expert(layer) * bytes_per_value(layer) + tokens * p.hidden * 4
    cost = Cost(int(num_bytes), int(2 * used * MAX_TOKENS * values_per_expert(layer)))
    router_bytes = gate.num_experts * gate.hidden * getattr(torch, gate.weight_dtype).itemsize
    whole = kernel_us(arch, cost, 1, "few") + BARRIERS * BARRIER_US + SLOT_US * slots
    whole += router_us(arch, tokens, gate_linear.waits(gate, 1), router_bytes)
    return whole - min(c.predict(tokens) for c in gate_linear_site(router, arch).candidates)
