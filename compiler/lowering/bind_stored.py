"""Sites whose weights are stored quantised: nothing is expanded when the engine is made.

A step gets the bytes of the codes and scales. Experts make the numbers of one expert at a time, a linear layer those of
its matrix, an embedding those of the wanted rows; see runtime/launch/stored.py. What else reads a quantised weight gets
it from a step of its own (Writer.tensor).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

from moec.compiler.kernels.linear import linear_codes
from moec.compiler.kernels.linear.linear_codes import StoredLinearProblem
from moec.compiler.kernels.spec import Cost
from moec.compiler.lowering import cost_model
from moec.compiler.lowering.bind_layers import arithmetic_dtype, dtype_of, given, kernel
from moec.compiler.lowering.buffers import dtype_name
from moec.compiler.lowering.candidates import Candidate, Results, Site, Write, of_specs
from moec.compiler.lowering.writer import Writer, arguments, format_fields
from moec.passes.ir.formats import WeightFormat
from moec.passes.ir.quantised import formats_of
from moec.passes.ir.weights import weight_of
from moec.runtime.program import Step


def formats_at(node: fx.Node | None) -> tuple[WeightFormat, ...]:
    """The formats of the weight that a node names; () for everything else."""
    weight = None if node is None else weight_of(node.graph.owning_module, node)  # type: ignore[arg-type]
    return () if weight is None else formats_of(weight)


def linear_site(site: Site, level: str | None) -> Site:
    """The site of an aten.linear; where its weight is stored quantised, with what reads it so."""
    a = arguments(site.node)
    formats = formats_at(a["weight"])
    if not formats:
        return site
    candidates = _linear(site.node, formats[0], level), *_linear_kernels(site.node, formats[0], level)
    return Site(site.node, (*candidates, *_refused(site.candidates, formats)), site.covers)


def _linear_kernels(node: fx.Node, format: WeightFormat, level: str | None) -> list[Candidate]:
    a = arguments(node)
    rows, columns = (int(n) for n in a["weight"].meta["val"].shape)
    dtype = dtype_of(a["input"]) or "float32"
    problem = StoredLinearProblem(columns, rows, format, dtype, dtype_of(a["bias"]))

    def write(symbol: str) -> Write:
        def calls(writer: Writer, results: Results) -> None:
            args = [writer.dense(a["input"]), writer.stored(a["weight"])]
            args += [writer.dense(b, whole=True) for b in given(a["bias"])]
            kernel(writer, symbol, node, [*args, {"buffer": results[0]}], results)

        return calls

    return of_specs(linear_codes.SPECS, problem, dtype, level, write)


def _linear(node: fx.Node, format: WeightFormat, level: str | None) -> Candidate:
    a = arguments(node)
    rows, columns = (int(n) for n in a["weight"].meta["val"].shape)

    def write(writer: Writer, results: Results) -> None:
        args = (writer.tensor(a["input"]), writer.stored(a["weight"]), a["bias"] and writer.tensor(a["bias"]))
        constants = {"format": format_fields(format), "rows": rows, "columns": columns}
        writer.steps.append(Step("library", "stored_linear", node.name, args, constants, tuple(results)))

    def predict(tokens: int) -> float:
        cost = Cost(format.matrix_bytes(rows, columns), 2 * tokens * rows * columns)
        dtype = arithmetic_dtype(dtype_of(a["input"]))
        return cost_model.decode_us(rows * columns, level) + cost_model.library_us(cost, 8, dtype, level)

    return Candidate(f"library-linear-{format.name}", predict, write)


def experts_candidates(
    layer: Any, library: Candidate, kernels: list[Candidate], level: str | None = None
) -> tuple[Candidate, ...]:
    """The candidates of a layer of experts, library first; see bind_experts.Layer."""
    formats = formats_at(layer.w_gate_up), formats_at(layer.w_down)
    if not any(formats):
        return (library, *kernels)
    names = sorted({f.name for some in formats for f in some})
    reason = f"takes no weights in {', '.join(names)}"
    kernels = [dataclasses.replace(k, refused=k.refused or reason) for k in kernels]
    return (_experts(layer, library, names, level), *kernels)


def _experts(layer: Any, library: Candidate, names: list[str], level: str | None) -> Candidate:
    """One expert after the other, its numbers made from what is stored."""
    stacks = (layer.w_gate_up, layer.w_down)
    shapes = [[int(n) for n in s.meta["val"].shape] for s in stacks]

    def write(writer: Writer, results: Results) -> None:
        fields = [[format_fields(f) for f in some] for some in (writer.formats(s) for s in stacks)]
        tensors = [writer.tensor(n) for n in (layer.x, layer.weights, layer.experts)]
        tensors += [writer.stored(s) for s in stacks]
        tensors += [n and writer.tensor(n) for n in (layer.b_gate_up, layer.b_down, layer.shared_weight)]
        constants = {"act": layer.act, "gate_up": fields[0], "down": fields[1], "shapes": shapes}
        constants |= {"num_shared": layer.num_shared} if layer.num_shared else {}
        constants |= {"weight_on_input": True} if layer.weight_on_input else {}
        writer.steps.append(
            Step("library", "stored_experts", layer.node.name, tuple(tensors), constants, tuple(results))
        )

    values = sum(s[1] * s[2] for s in shapes)
    problem = layer.problem

    def predict(tokens: int) -> float:
        used = problem.num_experts * (1 - (1 - problem.top_k / problem.num_experts) ** tokens) + problem.num_shared
        return library.predict(tokens) + cost_model.decode_us(used * values, level)

    return Candidate(f"library-experts-{'+'.join(names)}", predict, write)


def _refused(candidates: tuple[Candidate, ...], formats: tuple[WeightFormat, ...]) -> list[Candidate]:
    reason = f"takes no weights in {formats[0].name}"
    return [dataclasses.replace(c, refused=c.refused or reason) for c in candidates]


def embedding_site(node: fx.Node, level: str | None) -> Site | None:
    """aten.embedding of a quantised table; None for others."""
    table, index = node.args[:2]
    assert isinstance(table, fx.Node) and isinstance(index, fx.Node)
    formats = formats_at(table)
    if not formats:
        return None
    rows, columns = (int(n) for n in table.meta["val"].shape)

    def write(writer: Writer, results: Results) -> None:
        args = (writer.stored(table), writer.tensor(index))
        constants: dict[str, Any] = {"format": format_fields(formats[0]), "rows": rows, "columns": columns}
        constants["dtype"] = dtype_name(table.meta["val"].dtype)
        writer.steps.append(Step("library", "stored_embedding", node.name, args, constants, tuple(results)))

    def predict(tokens: int) -> float:
        return 12 + cost_model.decode_us(tokens * columns, level)

    return Site(node, (Candidate(f"library-embedding-{formats[0].name}", predict, write),))
