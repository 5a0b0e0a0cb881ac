"""Sites of norms, RoPE, attention and the router: the kernels' problems read from nodes, and their calls written.

Each function takes a node and the target's level and gives the site; the first candidate is always the library's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from moec.compiler.kernels.attention import cached_attention as attention_kernel
from moec.compiler.kernels.attention.problem import AttentionProblem
from moec.compiler.kernels.gate import gate as gate_kernel
from moec.compiler.kernels.gate import gate_linear as gate_linear_kernel
from moec.compiler.kernels.gate.problem import GateProblem
from moec.compiler.kernels.norm import add_rms_norm, rms_norm
from moec.compiler.kernels.norm.row import NormProblem
from moec.compiler.kernels.rope import rope as rope_kernel
from moec.compiler.kernels.rope.rope import RopeProblem
from moec.compiler.kernels.spec import Cost
from moec.compiler.lowering import cost_model
from moec.compiler.lowering.buffers import dtype_name
from moec.compiler.lowering.candidates import Candidate, Results, Site, Write, of_specs
from moec.compiler.lowering.writer import Writer, arguments, split_arguments
from moec.runtime.program import Step


def library(node: fx.Node, num_calls: float, cost: Any, level: str | None = None) -> Candidate:
    """The runtime's own function for a moec op. num_calls: torch calls that it makes. cost: tokens -> Cost. level: of
    the target."""
    name = op_name(node)
    dtype = arithmetic_dtype(dtype_of(node.args[0]))

    def write(writer: Writer, results: Results) -> None:
        tensors, constants = split_arguments(node)
        args = tuple(writer.encode(a, node) for a in tensors)
        several = isinstance(node.meta["val"], list | tuple)
        writer.steps.append(Step("library", name, node.name, args, constants, tuple(results), several))

    return Candidate(f"library-{name}", lambda t: cost_model.library_us(cost(t), num_calls, dtype, level), write)


def op_name(node: fx.Node) -> str:
    """Without namespace and overload."""
    return node.target._schema.name.split("::")[1]  # type: ignore[union-attr]


def dtype_of(node: Any) -> str | None:
    """Of a node's value as programs name it, None of None."""
    return None if node is None else dtype_name(node.meta["val"].dtype)


def arithmetic_dtype(dtype: str | None) -> str:
    """What the cost model knows a rate for."""
    return "bfloat16" if dtype == "bfloat16" else "float32"


def kernel(writer: Writer, symbol: str, node: fx.Node, args: list[Any], results: Results) -> None:
    """Appends a kernel step; its results are allocated where the memory plan has no place for them."""
    writer.steps.append(Step("kernel", symbol, node.name, tuple(args), outputs=tuple(results)))


def given(*tensors: fx.Node | None) -> list[fx.Node]:
    """Those that are not None, in order."""
    return [t for t in tensors if t is not None]


def norm_site(node: fx.Node, level: str | None) -> Site:
    """moec::rms_norm and moec::add_rms_norm."""
    a = arguments(node)
    fused = op_name(node) == "add_rms_norm"
    weight, x = a["weight"], a["x"].meta["val"]
    problem = NormProblem(
        hidden=int(x.shape[-1]),
        dtype=dtype_name(x.dtype),
        weight_dtype=dtype_of(weight),
        cast=a["cast"],
        centre=a["centre"],
        heads=x.dim() == 3,
        weight_per_head=weight is not None and weight.meta["val"].dim() == 2,
        num_heads=int(x.shape[1]) if x.dim() == 3 and isinstance(x.shape[1], int) else 1,
    )
    specs = add_rms_norm.SPECS if fused else rms_norm.SPECS

    def write(symbol: str) -> Write:
        def calls(writer: Writer, results: Results) -> None:
            sources = [a["x"], *([a["residual"]] if fused else [])]
            args = [writer.dense(s) for s in sources] + [writer.dense(w, whole=True) for w in given(weight)]
            args += [writer.filled(r, node, i) for i, r in enumerate(results)]
            kernel(writer, symbol, node, [*args, a["eps"], a["offset"]], results)

        return calls

    fits = x.dim() in (2, 3) and _is_dense(node)
    kernels = of_specs(specs, problem, problem.dtype, level, write)
    if not fits:
        kernels = [_refuse(k, "x is neither [T,H] nor [T,Q,H], or its result is not dense") for k in kernels]
    plain = library(node, 2 if problem.dtype == "float32" else 9, lambda t: specs[0].cost(problem, t), level)
    return Site(node, (plain, *kernels))


def rope_site(node: fx.Node, level: str | None) -> Site:
    """moec::rope on one tensor."""
    a = arguments(node)
    x = a["x"].meta["val"]
    problem = RopeProblem(
        head_dim=int(x.shape[2]),
        rotary_dim=a["rotary_dim"],
        dtype=dtype_name(x.dtype),
        angle_dtype=dtype_of(a["cos"]) or "float32",
        pairing=a["pairing"],
        compute_dtype=a["compute_dtype"],
        num_heads=int(x.shape[1]),
    )

    def write(symbol: str) -> Write:
        def calls(writer: Writer, results: Results) -> None:
            args = [writer.dense(a[name]) for name in ("x", "cos", "sin")]
            kernel(writer, symbol, node, [*args, {"buffer": results[0]}], results)

        return calls

    kernels = of_specs(rope_kernel.SPECS, problem, problem.dtype, level, write)
    return Site(node, (library(node, 12, lambda t: rope_kernel.SPECS[0].cost(problem, t), level), *kernels))


def attention_site(node: fx.Node, level: str | None) -> Site:
    """moec::cached_attention, and the same over int8 caches."""
    a = arguments(node)
    q, v = a["q"].meta["val"], a["v"].meta["val"]
    problem = AttentionProblem(
        num_heads=int(q.shape[1]),
        num_kv_heads=int(v.shape[1]),
        head_dim=int(q.shape[2]),
        value_dim=int(v.shape[2]),
        dtype=dtype_name(q.dtype),
        cache_dtype=dtype_of(a["k_cache"]) or "float32",
        sinks_dtype=dtype_of(a["sinks"]),
        softcap=a["softcap"] != 0.0,
    )

    def write(symbol: str) -> Write:
        def calls(writer: Writer, results: Results) -> None:
            args = [writer.dense(a[name]) for name in ("q", "k", "v")]
            caches = [name for name in ("k_cache", "v_cache", "k_scales", "v_scales") if name in a]
            args += [writer.tensor(a[name]) for name in (*caches, "slots", "positions")]
            args += [writer.dense(s, whole=True) for s in given(a["sinks"])]
            constants = [a["scale"], a["window"], a["chunk"], a["softcap"]]
            kernel(writer, symbol, node, [*args, {"buffer": results[0]}, *constants], results)

        return calls

    def predict(tokens: int) -> float:
        cost = attention_kernel.library_cost(problem, tokens)
        return cost_model.library_attention_us(cost, 8, arithmetic_dtype(problem.dtype), level)

    kernels = of_specs(attention_kernel.SPECS, problem, problem.dtype, level, write)
    plain = dataclasses.replace(library(node, 8, lambda t: Cost(0, 0), level), predict=predict)
    return Site(node, (plain, *kernels))


def gate_problem(node: fx.Node) -> GateProblem:
    """Of moec::gate and moec::gate_linear."""
    a = arguments(node)
    if "logits" in a:
        logits = a["logits"].meta["val"]
        return GateProblem(a["spec"], int(logits.shape[1]), dtype_name(logits.dtype), dtype_of(a["selection_bias"]))
    weight = a["w"].meta["val"]
    return GateProblem(
        spec=a["spec"],
        num_experts=int(weight.shape[0]),
        logits_dtype=a["router_dtype"],
        selection_bias_dtype=dtype_of(a["selection_bias"]),
        hidden=int(weight.shape[1]),
        x_dtype=dtype_of(a["x"]) or "float32",
        weight_dtype=dtype_name(weight.dtype),
        bias_dtype=dtype_of(a["bias"]),
    )


def gate_site(node: fx.Node, level: str | None) -> Site:
    """moec::gate."""
    problem, a = gate_problem(node), arguments(node)

    def write(symbol: str) -> Write:
        def calls(writer: Writer, results: Results) -> None:
            args = [writer.dense(t, whole=True) for t in given(a["logits"], a["selection_bias"])]
            args += [writer.filled(r, node, i) for i, r in enumerate(results)]
            kernel(writer, symbol, node, args, results)

        return calls

    kernels = of_specs(gate_kernel.SPECS, problem, "float32", level, write)
    return Site(node, (library(node, 10, lambda t: gate_kernel.SPECS[0].cost(problem, t), level), *kernels))


def gate_linear_site(node: fx.Node, level: str | None) -> Site:
    """moec::gate_linear: by the library, by one kernel, or by a library GEMM and the gate kernel on its logits."""
    problem, a = gate_problem(node), arguments(node)

    def cost(t: int) -> Cost:
        return gate_linear_kernel.SPECS[0].cost(problem, t)

    def write(symbol: str) -> Write:
        def calls(writer: Writer, results: Results) -> None:
            args = [writer.dense(a["x"]), writer.dense(a["w"], whole=True)]
            args += [writer.dense(t, whole=True) for t in given(a["bias"], a["selection_bias"])]
            args.append(writer.scratch(f"{node.name}_logits", "float32", (_rows(writer, node), problem.num_experts)))
            args += [writer.filled(r, node, i) for i, r in enumerate(results)]
            kernel(writer, symbol, node, args, results)

        return calls

    kernels = of_specs(gate_linear_kernel.SPECS, problem, arithmetic_dtype(problem.x_dtype), level, write)
    split = [_split_gate(node, problem, c, level) for c in _gate_of_logits(problem, level)]
    return Site(node, (library(node, 12, cost, level), *kernels, *split))


def _gate_of_logits(problem: GateProblem, level: str | None) -> list[Candidate]:
    plain = GateProblem(problem.spec, problem.num_experts, problem.logits_dtype, problem.selection_bias_dtype)
    return of_specs(gate_kernel.SPECS, plain, "float32", level, lambda symbol: lambda writer, results: None)


def _split_gate(node: fx.Node, problem: GateProblem, gate: Candidate, level: str | None) -> Candidate:
    """The router's GEMM by the library, then the gate kernel. gate: the kernel's candidate for the logits alone."""
    a = arguments(node)
    router = getattr(torch, problem.logits_dtype)
    products = Cost(0, 0) if gate.refused else gate_linear_kernel.SPECS[0].cost(problem, 1)

    def write(writer: Writer, results: Results) -> None:
        x, w = writer.dense(a["x"], dtype=router), writer.dense(a["w"], dtype=router)
        bias = [writer.dense(b, dtype=router) for b in given(a["bias"])]
        rows = (_rows(writer, node), problem.num_experts)
        logits = writer.buffers.add_shape(f"{node.name}_logits", problem.logits_dtype, rows, "value")
        writer.steps.append(
            Step("aten", "aten.linear.default", node.name, (x, w, *bias), outputs=(logits,)),
        )
        args = [{"buffer": logits}, *(writer.dense(s, whole=True) for s in given(a["selection_bias"]))]
        args += [writer.filled(r, node, i) for i, r in enumerate(results)]
        kernel(writer, gate.symbols[0], node, args, results)

    def predict(tokens: int) -> float:
        gemm = Cost(products.num_bytes, 2 * tokens * problem.num_experts * problem.hidden)
        casts = sum(dtype_of(a[n]) != problem.logits_dtype for n in ("x", "w"))
        dtype = arithmetic_dtype(problem.logits_dtype)
        return gate.predict(tokens) + cost_model.library_us(gemm, 1 + casts, dtype, level)

    return Candidate(f"linear+{gate.name}", predict, write, gate.refused, gate.functions, gate.symbols)


def _rows(writer: Writer, node: fx.Node) -> Any:
    """T of a node's first result, as a size."""
    val = node.meta["val"]
    return writer.buffers.size((val[0] if isinstance(val, list | tuple) else val).shape[0], node)


def _is_dense(node: fx.Node) -> bool:
    val = node.meta["val"]
    return all(v.is_contiguous() for v in (val if isinstance(val, list | tuple) else [val]))


def _refuse(candidate: Candidate, reason: str) -> Candidate:
    return Candidate(candidate.name, candidate.predict, candidate.write, candidate.refused or reason)
