"""Sites of norms, RoPE and the router on a GPU: the kernels of compiler/kernels/cuda, and torch's own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moec.compiler.codegen.cuda_archs import Architecture
from moec.compiler.kernels.cuda import gate as gate_kernel
from moec.compiler.kernels.cuda import gate_linear
from moec.compiler.kernels.cuda import rms_norm as norm_kernel
from moec.compiler.kernels.cuda import rope as rope_kernel
from moec.compiler.kernels.cuda.kernel import CudaKernel
from moec.compiler.kernels.cuda.rope import RopeProblem
from moec.compiler.kernels.gate.problem import GateProblem
from moec.compiler.kernels.norm.row import NormProblem
from moec.compiler.kernels.spec import Cost
from moec.compiler.lowering.bind_layers import dtype_of, gate_problem, given, op_name
from moec.compiler.lowering.bind_layers import library as library_candidate
from moec.compiler.lowering.candidates import Candidate, Results, Site
from moec.compiler.lowering.cuda.cost import kernel_us, library_us, router_us
from moec.compiler.lowering.cuda.launches import (
    candidate,
    launch,
    named,
    refused,
    rows_of,
    shared_numbers,
    size,
    strided_rows,
)
from moec.compiler.lowering.cuda.launches import times as multiplied
from moec.compiler.lowering.writer import Writer, arguments
from moec.runtime.program import Step


def library(node: fx.Node, arch: Architecture, launches: float, cost: Callable[[int], Cost]) -> Candidate:
    """The runtime's function for a moec op, which makes so many launches of torch's."""
    plain = library_candidate(node, launches, cost)
    return Candidate(plain.name, lambda t: library_us(arch, cost(t), launches), plain.write)


def norm_site(node: fx.Node, arch: Architecture) -> Site:
    """moec::rms_norm and moec::add_rms_norm."""
    a = arguments(node)
    fused, x = op_name(node) == "add_rms_norm", a["x"].meta["val"]
    weight = a["weight"]
    problem = NormProblem(
        hidden=int(x.shape[-1]),
        dtype=str(x.dtype).removeprefix("torch."),
        weight_dtype=dtype_of(weight),
        cast=a["cast"],
        centre=a["centre"],
        heads=x.dim() == 3,
        weight_per_head=weight is not None and weight.meta["val"].dim() == 2,
    )
    inner = int(x.shape[1]) if x.dim() == 3 else 1

    def cost(tokens: int) -> Cost:
        return Cost(tokens * inner * problem.hidden * x.element_size() * (4 if fused else 2), 0)

    plain = library(node, arch, 9 if problem.dtype != "float32" else 2, cost)
    name = f"cuda-{op_name(node).replace('_', '-')}"
    reason = norm_kernel.refusal(problem) or (None if x.dim() in (2, 3) else "x is neither [T,H] nor [T,Q,H]")
    if reason is None and problem.heads and fused:
        reason = "a residual of [T,Q,H]"
    if reason:
        return Site(node, (plain, refused(name, reason)))
    kernel = named(CudaKernel("norm", arch.name, lambda: norm_kernel.build(problem, fused)), problem, fused)

    def write(writer: Writer, results: Results) -> None:
        rows = rows_of(writer, a["x"])
        if problem.heads:
            place, stride = writer.dense(a["x"], whole=True), problem.hidden
        else:
            place, stride = strided_rows(writer, a["x"])
        values = {"x": place, "x_stride": stride, "n": size(multiplied(rows, inner))}
        values |= {"x_elements": size(multiplied(rows, inner * stride)), "eps": a["eps"], "offset": a["offset"]}
        if fused:
            values["residual"] = writer.dense(a["residual"], whole=True)
        if weight is not None:
            values["weight"] = writer.dense(weight, whole=True)
        made = [writer.filled(r, node, i) for i, r in enumerate(results)]
        values |= dict(zip(("y", "total"), made, strict=False))
        launch(writer, kernel, node, values, [m["buffer"] for m in made])

    return Site(node, (plain, candidate(name, lambda t: kernel_us(arch, cost(t), 1), write, [kernel])))


def rope_site(node: fx.Node, arch: Architecture) -> Site:
    """moec::rope on one tensor."""
    a = arguments(node)
    x = a["x"].meta["val"]
    problem = RopeProblem(int(x.shape[1]), int(x.shape[2]), a["rotary_dim"], a["pairing"], a["compute_dtype"])

    def cost(tokens: int) -> Cost:
        return Cost(2 * tokens * problem.heads * problem.width * x.element_size(), 0)

    plain = library(node, arch, 10, cost)
    reason = problem.refusal() or (None if x.dtype == torch.bfloat16 else f"x in {dtype_of(a['x'])}; only bfloat16")
    if reason:
        return Site(node, (plain, refused("cuda-rope", reason)))
    kernel = named(CudaKernel("rope", arch.name, lambda: rope_kernel.build(problem)), problem)

    def write(writer: Writer, results: Results) -> None:
        rows = rows_of(writer, node)
        place, stride = strided_rows(writer, a["x"])
        values = {"x": place, "x_stride": stride, "x_elements": size(multiplied(rows, stride)), "n": size(rows)}
        values |= {name: shared_numbers(writer, a[name], torch.float32) for name in ("cos", "sin")}
        launch(writer, kernel, node, values | {"y": {"buffer": results[0]}}, results)

    return Site(node, (plain, candidate("cuda-rope", lambda t: kernel_us(arch, cost(t), 1), write, [kernel])))


def gate_site(node: fx.Node, arch: Architecture) -> Site:
    """moec::gate."""
    problem, a = gate_problem(node), arguments(node)

    def cost(tokens: int) -> Cost:
        return Cost(4 * tokens * problem.num_experts, 0)

    plain = library(node, arch, 12, cost)
    if reason := gate_kernel.refusal(problem):
        return Site(node, (plain, refused("cuda-gate", reason)))
    kernel = named(CudaKernel("gate", arch.name, lambda: gate_kernel.build(problem)), problem)

    def write(writer: Writer, results: Results) -> None:
        _launch_gate(writer, kernel, node, writer.dense(a["logits"], whole=True), a["selection_bias"], results)

    return Site(node, (plain, candidate("cuda-gate", lambda t: kernel_us(arch, cost(t), 1), write, [kernel])))


def _launch_gate(
    writer: Writer, kernel: CudaKernel, node: fx.Node, logits: Any, bias: fx.Node | None, results: Results
) -> None:
    values = {"logits": logits, "n": size(rows_of(writer, node))}
    if bias is not None:
        values["selection_bias"] = writer.dense(bias, whole=True)
    made = [writer.filled(r, node, i) for i, r in enumerate(results)]
    launch(writer, kernel, node, values | dict(zip(("weights", "experts"), made, strict=True)), [
        m["buffer"] for m in made
    ])  # fmt: skip


def gate_linear_site(node: fx.Node, arch: Architecture) -> Site:
    """moec::gate_linear: torch's GEMM with the gate kernel on its logits, or, for few tokens, both in one launch."""
    problem, a = gate_problem(node), arguments(node)
    router = getattr(torch, problem.logits_dtype)
    alone = type(problem)(problem.spec, problem.num_experts, problem.logits_dtype, problem.selection_bias_dtype)
    casts = sum(dtype_of(t) != problem.logits_dtype for t in given(a["x"], a["w"], a["bias"]))

    def cost(tokens: int) -> Cost:
        weights = problem.num_experts * problem.hidden
        return Cost(router.itemsize * (weights + tokens * problem.hidden), 2 * tokens * weights)

    plain = library(node, arch, 13 + casts, cost)
    if reason := gate_kernel.refusal(alone):
        return Site(node, (plain, refused("linear+cuda-gate", reason)))
    kernel = named(CudaKernel("gate", arch.name, lambda: gate_kernel.build(alone)), alone)
    fused = _fused_gate(node, problem, arch)

    def write(writer: Writer, results: Results) -> None:
        operands = [writer.dense(t, dtype=router) for t in given(a["x"], a["w"], a["bias"])]
        shape = (rows_of(writer, node), problem.num_experts)
        logits = writer.buffers.add_shape(f"{node.name}_logits", problem.logits_dtype, shape, "value")
        writer.steps.append(Step("aten", "aten.linear.default", node.name, tuple(operands), outputs=(logits,)))
        _launch_gate(writer, kernel, node, {"buffer": logits}, a["selection_bias"], results)

    def predict(tokens: int) -> float:
        return kernel_us(arch, Cost(0, 0), 1) + library_us(arch, cost(tokens), 1 + casts)

    return Site(node, (plain, candidate("linear+cuda-gate", predict, write, [kernel]), fused))


def _fused_gate(node: fx.Node, problem: GateProblem, arch: Architecture) -> Candidate:
    """The router's products and the gate in one launch."""
    name, a = "cuda-gate-linear", arguments(node)
    if reason := gate_linear.refusal(problem):
        return refused(name, reason)
    kernel = named(CudaKernel("gate_linear", arch.name, lambda: gate_linear.build(problem)), problem)
    router_bytes = problem.num_experts * problem.hidden * getattr(torch, problem.weight_dtype).itemsize
    waits = gate_linear.waits(problem, gate_linear.PER_WARP)

    def write(writer: Writer, results: Results) -> None:
        rows = rows_of(writer, node)
        values = {"x": writer.dense(a["x"], whole=True), "w": writer.dense(a["w"], whole=True), "n": size(rows)}
        for role in ("bias", "selection_bias"):
            values |= {} if a[role] is None else {role: writer.dense(a[role], whole=True)}
        values["logits"] = writer.scratch(f"{node.name}_few_logits", "float32", (rows, problem.num_experts))
        values["arrived"] = writer.zeros("gate_arrived", "int32", (gate_linear.MAX_TOKENS,))
        made = [writer.filled(r, node, i) for i, r in enumerate(results)]
        values |= dict(zip(("weights", "experts"), made, strict=True))
        launch(writer, kernel, node, values, [m["buffer"] for m in made])

    def predict(tokens: int) -> float:
        if tokens > gate_linear.MAX_TOKENS:
            return float("inf")
        return kernel_us(arch, Cost(0, 0), 1) + router_us(arch, tokens, waits, router_bytes)

    return candidate(name, predict, write, [kernel])
