"""Sites of dense layers, aten.linear and moec::gated_mlp: ATen, oneDNN with packed weights, streaming kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

from moec.compiler.kernels.linear import linear as linear_kernel
from moec.compiler.kernels.linear.linear import LinearProblem
from moec.compiler.kernels.mlp import gated_mlp as mlp_kernel
from moec.compiler.kernels.mlp.gated_mlp import MlpProblem
from moec.compiler.kernels.spec import Cost, KernelSpec
from moec.compiler.lowering import cost_model
from moec.compiler.lowering.bind_layers import arithmetic_dtype, dtype_of, given, kernel, library
from moec.compiler.lowering.bind_stored import linear_site as stored_linear_site
from moec.compiler.lowering.buffers import dtype_name
from moec.compiler.lowering.candidates import Candidate, Results, Site, Write, of_specs
from moec.compiler.lowering.writer import Writer, arguments
from moec.runtime.program import Step


def linear_site(node: fx.Node, level: str | None) -> Site | None:
    """aten.linear on rows [T, K]; None for other ranks."""
    a = arguments(node)
    x, w = a["input"].meta["val"], a["weight"].meta["val"]
    if x.dim() != 2 or w.dim() != 2 or not x.is_floating_point():
        return None
    problem = LinearProblem(
        in_features=int(w.shape[1]),
        out_features=int(w.shape[0]),
        dtype=dtype_name(x.dtype),
        weight_dtype=dtype_name(w.dtype),
        bias_dtype=dtype_of(a["bias"]),
    )

    def write(symbol: str) -> Write:
        def calls(writer: Writer, results: Results) -> None:
            args = [writer.dense(a["input"]), writer.dense(a["weight"], whole=True)]
            args += [writer.dense(b, whole=True) for b in given(a["bias"])]
            kernel(writer, symbol, node, [*args, {"buffer": results[0]}], results)

        return calls

    kernels = _streaming(linear_kernel.SPECS, problem, problem.dtype, level, write)
    return stored_linear_site(
        Site(node, (_aten(node, problem, level), _prepacked(node, problem, level), *kernels)), level
    )


def _linear_cost(problem: LinearProblem, tokens: int) -> Cost:
    return linear_kernel.SPECS[0].cost(problem, tokens)


def _aten(node: fx.Node, problem: LinearProblem, level: str | None) -> Candidate:
    dtype = arithmetic_dtype(problem.dtype)

    def write(writer: Writer, results: Results) -> None:
        args = tuple(writer.encode(x, node) for x in node.args)
        kwargs = {k: writer.encode(v, node) for k, v in node.kwargs.items() if v is not None}
        writer.steps.append(Step("aten", "aten.linear.default", node.name, args, kwargs, tuple(results)))

    def predict(tokens: int) -> float:
        return cost_model.aten_linear_us(_linear_cost(problem, tokens), tokens, dtype, level)

    return Candidate("aten-linear", predict, write)


def _prepacked(node: fx.Node, problem: LinearProblem, level: str | None) -> Candidate:
    a = arguments(node)
    dtype = arithmetic_dtype(problem.dtype)
    refused = None
    if a["weight"].op != "get_attr" or (a["bias"] is not None and a["bias"].op != "get_attr"):
        refused = "the weight is computed by the graph"
    elif problem.dtype not in ("float32", "bfloat16") or problem.dtype != problem.weight_dtype:
        refused = f"x in {problem.dtype} and weight in {problem.weight_dtype}"
    elif problem.dtype == "bfloat16" and level in (None, "avx2"):
        refused = "oneDNN packs bfloat16 weights only where there is AVX-512"

    def write(writer: Writer, results: Results) -> None:
        tensors = [a["input"], a["weight"], a["bias"]]
        args = tuple(None if t is None else writer.tensor(t) for t in tensors)
        writer.steps.append(Step("library", "prepacked_linear", node.name, args, outputs=tuple(results)))

    def predict(tokens: int) -> float:
        return cost_model.prepacked_linear_us(_linear_cost(problem, tokens), dtype, level)

    return Candidate("onednn-prepacked-linear", predict, write, refused)


def mlp_site(node: fx.Node, level: str | None) -> Site:
    """moec::gated_mlp."""
    a = arguments(node)
    w_in, w_out = a["w_gate_up"].meta["val"], a["w_down"].meta["val"]
    problem = MlpProblem(
        hidden=int(w_in.shape[1]),
        inner=int(w_out.shape[1]),
        act=a["act"],
        dtype=dtype_of(a["x"]) or "float32",
        bias_dtypes=(dtype_of(a["b_gate_up"]), dtype_of(a["b_down"])),
    )

    def write(symbol: str) -> Write:
        def calls(writer: Writer, results: Results) -> None:
            args = [writer.dense(a["x"])]
            tensors = given(a["w_gate_up"], a["w_down"], a["b_gate_up"], a["b_down"])
            args += [writer.dense(t, whole=True) for t in tensors]
            rows = writer.buffers.size(a["x"].meta["val"].shape[0], node)
            args.append(writer.scratch(f"{node.name}_h", problem.dtype, (rows, problem.inner)))
            kernel(writer, symbol, node, [*args, {"buffer": results[0]}], results)

        return calls

    def predict(tokens: int) -> float:
        cost = mlp_kernel.SPECS[0].cost(problem, tokens)
        dtype = arithmetic_dtype(problem.dtype)
        calls = [cost_model.aten_linear_us(c, t, dtype, level) for c, t in ((cost, tokens), (Cost(0, 0), 1))]
        return sum(calls) + 6

    plain = dataclasses.replace(library(node, 1, lambda t: Cost(0, 0)), predict=predict)
    kernels = _streaming(mlp_kernel.SPECS, problem, problem.dtype, level, write)
    if a["x"].meta["val"].dim() != 2:
        kernels = [dataclasses.replace(k, refused=k.refused or "x is not [T,H]") for k in kernels]
    return Site(node, (plain, *kernels))


def _streaming(
    specs: tuple[KernelSpec[Any], ...], problem: Any, dtype: str, level: str | None, write: Any
) -> list[Candidate]:
    """Candidates of kernels that stream row-major weights; see cost_model.streaming_us."""
    by_name = {spec.name: spec for spec in specs}
    return [
        c if c.refused else dataclasses.replace(c, predict=_streaming_predict(by_name[c.name], problem, dtype, level))
        for c in of_specs(specs, problem, dtype, level, write)
    ]


def _streaming_predict(spec: KernelSpec[Any], problem: Any, dtype: str, level: str | None) -> Any:
    return lambda t: cost_model.streaming_us(
        spec.cost(problem, t), spec.level or "avx2", arithmetic_dtype(dtype), level
    )
