"""Sites of expert layers: dispatch, grouped_gemm and combine_gemm recognised as one layer, or moec::experts itself.

A whole-layer kernel reads packed weights, so it serves every number of tokens or none; the unpacked stacks are then not
stored. The chain is recognised by dataflow, and only where nobody else reads its intermediate values.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx

from moec.compiler.kernels.experts import call as experts_call
from moec.compiler.kernels.experts import knobs
from moec.compiler.kernels.experts.catalogue import SPECS
from moec.compiler.kernels.spec import ExpertsProblem, KernelSpec
from moec.compiler.lowering import bind_stored, cost_model
from moec.compiler.lowering.buffers import dtype_name
from moec.compiler.lowering.candidates import Candidate, Results, Site, Write, of_specs
from moec.compiler.lowering.packing import packed_bias_down, packed_bias_gate_up, packed_down, packed_gate_up
from moec.compiler.lowering.writer import Writer, arguments
from moec.passes.ir import ops
from moec.passes.ir.activation import Activation
from moec.runtime.expressions import Size
from moec.runtime.program import Step

aten = torch.ops.aten
MARGIN_BYTES = 16 * 64  # rounding of up to 16 regions to cache lines
DISPATCH, GROUPED, COMBINE = (op._opoverload for op in (ops.dispatch, ops.grouped_gemm, ops.combine_gemm))


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of experts in the graph, however it is spelled. node: its result. covers: nodes inside it."""

    node: fx.Node
    x: fx.Node
    weights: fx.Node
    experts: fx.Node
    w_gate_up: fx.Node
    w_down: fx.Node
    b_gate_up: fx.Node | None
    b_down: fx.Node | None
    shared_weight: fx.Node | None
    act: str
    num_shared: int
    weight_on_input: bool
    covers: tuple[fx.Node, ...] = ()

    @property
    def stacks(self) -> tuple[fx.Node | None, ...]:
        """The weights that a kernel packs."""
        return (self.w_gate_up, self.w_down, self.b_gate_up, self.b_down)

    @property
    def problem(self) -> ExpertsProblem:
        """What the CPU kernels of the layer solve, read from the shapes of its stacks; weights as their numbers."""
        stack = self.w_gate_up.meta["val"].shape
        return ExpertsProblem(
            hidden=int(stack[2]),
            inner=int(stack[1]) // (2 if Activation.parse(self.act).gated else 1),
            num_experts=int(stack[0]) - self.num_shared,
            top_k=int(self.experts.meta["val"].shape[1]),
            num_shared=self.num_shared,
            act=self.act,
            dtype=dtype_name(self.x.meta["val"].dtype),
            has_bias=self.b_gate_up is not None,
            has_shared_weight=self.shared_weight is not None,
            weight_on_input=self.weight_on_input,
        )


def layer_of_experts(node: fx.Node) -> Layer | None:
    """moec::experts in canonical layout as a layer."""
    a = arguments(node)
    if a["transposed"] or a["interleaved"]:
        return None
    names = ("x", "weights", "experts", "w_gate_up", "w_down", "b_gate_up", "b_down", "shared_weight", "act")
    chosen: dict[str, Any] = {n: a[n] for n in names}
    return Layer(node, **chosen, num_shared=a["num_shared"], weight_on_input=a["weight_on_input"])


def layer_of_chain(combine: fx.Node) -> Layer | None:
    """The layer that ends in this moec::combine_gemm, None where the chain is another one or is read from outside."""
    c = arguments(combine)
    grouped = c["h"]
    if not isinstance(grouped, fx.Node) or grouped.target is not GROUPED or len(grouped.users) > 1:
        return None
    g = arguments(grouped)
    order, start = g["slot_order"], g["expert_start"]
    dispatch = order.args[0] if order.target is operator.getitem else None
    if (order, start) != (c["slot_order"], c["expert_start"]) or dispatch is None or dispatch.target is not DISPATCH:
        return None
    on_input, on_output = g["slot_weight"], c["slot_weight"]
    if (on_input is None) == (on_output is None):
        return None
    d = arguments(dispatch)
    slot_weight = on_output if on_input is None else on_input
    found = slot_weights(slot_weight, d["num_shared"])
    if found is None:
        return None
    weights, shared, inside = found
    inside_all = [grouped, order, start, dispatch, *inside]
    if not _is_private(inside_all, combine):
        return None
    return Layer(
        combine, g["x"], weights, d["experts"], g["w"], c["w"], g["bias"], c["bias"], shared, g["act"],
        d["num_shared"], on_input is not None, tuple(inside_all),
    )  # fmt: skip


def slot_weights(node: fx.Node, num_shared: int) -> tuple[fx.Node, fx.Node | None, list[fx.Node]] | None:
    """flatten of weights, or of cat(weights, shared..) -> weights, shared weight (None: ones), nodes inside."""
    if node.target is not aten.flatten.using_ints:
        return None
    inner: Any = node.args[0]
    if not num_shared:
        return inner, None, [node]
    if inner.target is aten.cat.default and len(inner.args[0]) == 1 + num_shared and len(set(inner.args[0][1:])) == 1:
        weights, column = inner.args[0][0], inner.args[0][1]
        chain = [node, inner]
        if column.target is aten.to.dtype:
            chain.append(column)
            column = column.args[0]
        if column.target is aten.ones_like.default and column.args[0].target is aten.slice.Tensor:
            return weights, None, [*chain, column, column.args[0]]
        if column.target is aten.unsqueeze.default and column.args[1] == 1:
            return weights, column.args[0], [*chain, column]
    return None


def _is_private(nodes: list[fx.Node], end: fx.Node) -> bool:
    """Whether only these nodes and `end` read the values of these nodes."""
    inside = {*nodes, end}
    return all(user in inside for n in nodes for user in n.users)


def experts_site(layer: Layer, level: str | None) -> Site:
    """The site of one layer: the library's function, and the whole-layer kernels."""
    problem, formats = layer.problem, (bind_stored.formats_at(layer.w_gate_up), bind_stored.formats_at(layer.w_down))
    one_each = all(len(some) == 1 for some in formats)
    if one_each:
        problem = dataclasses.replace(problem, format_up=formats[0][0].name, format_down=formats[1][0].name)
    kernels: list[Candidate] = []
    for spec in SPECS:
        kernels += _candidates(layer, problem, spec, level)
    if any(n is not None and n.op != "get_attr" for n in layer.stacks):
        kernels = [
            dataclasses.replace(k, refused=k.refused or "the weights are computed by the graph") for k in kernels
        ]
    candidates = bind_stored.experts_candidates(
        layer, library_candidate(layer, problem, level), [] if one_each else kernels, level
    )
    return Site(layer.node, (*candidates, *(kernels if one_each else ())), layer.covers, problem)


def _candidates(
    layer: Layer, problem: ExpertsProblem, spec: KernelSpec[ExpertsProblem], level: str | None
) -> list[Candidate]:
    """The kernel as a candidate that can be configured."""

    def configured(config: Mapping[str, Any]) -> Candidate:
        (made,) = _candidates(layer, problem, knobs.configured(config).spec(), level)
        return made

    made = of_specs([spec], problem, problem.dtype, level, partial(_kernel, layer, problem, spec))
    return [dataclasses.replace(c, configured=configured) for c in made]


def library_candidate(layer: Layer, problem: ExpertsProblem, level: str | None = None) -> Candidate:
    """The runtime's function, expert by expert."""

    def write(writer: Writer, results: Results) -> None:
        tensors = (layer.x, layer.weights, layer.experts, layer.w_gate_up, layer.w_down)
        optional = (layer.b_gate_up, layer.b_down, layer.shared_weight)
        args = tuple(None if t is None else writer.tensor(t) for t in (*tensors, *optional))
        constants = {"act": layer.act, "num_shared": layer.num_shared, "weight_on_input": layer.weight_on_input}
        constants = {k: v for k, v in constants.items() if v}
        writer.steps.append(Step("library", "experts", layer.node.name, args, constants, tuple(results)))

    def predict(tokens: int) -> float:
        missed = (1 - problem.top_k / problem.num_experts) ** tokens
        used = problem.num_experts * (1 - missed) + problem.num_shared
        cost = experts_call.cost(problem, tokens)
        return cost_model.library_experts_us(cost, 12 + 6 * used, problem.dtype, level)

    return Candidate("library-experts", predict, write)


def _kernel(layer: Layer, problem: ExpertsProblem, spec: KernelSpec[ExpertsProblem], symbol: str) -> Write:
    def write(writer: Writer, results: Results) -> None:
        args = [writer.dense(layer.x, whole=True), writer.dense(layer.weights, True, torch.float32)]
        args.append(writer.dense(layer.experts, True, torch.int32))
        stacks = [n and writer.weight_of(n) for n in layer.stacks]
        packed = [packed_gate_up(problem, stacks[0]), packed_down(problem, stacks[1])]
        if problem.has_bias:
            packed += [packed_bias_gate_up(problem, stacks[2]), packed_bias_down(stacks[3])]
        named = [n.target for n in layer.stacks if n is not None]
        args += [writer.weight(f"{name}_packed", w) for name, w in zip(named, packed, strict=True)]
        if layer.shared_weight is not None:
            args.append(writer.dense(layer.shared_weight, True, torch.float32))
        rows = writer.buffers.size(layer.x.meta["val"].shape[0], layer.node)
        size = workspace_size(lambda tokens: spec.workspace_bytes(problem, tokens), rows)
        args.append(writer.scratch(f"{layer.node.name}_workspace", "uint8", (size,)))
        args.append({"buffer": results[0]})
        writer.steps.append(Step("kernel", symbol, layer.node.name, tuple(args), outputs=tuple(results)))

    return write


def workspace_size(num_bytes: Callable[[int], int], rows: Size) -> Size:
    """A bound of a kernel's workspace as an expression of its rows.

    A workspace is a sum of regions, each a linear function rounded up to a cache line, and may stop growing at some
    number of tokens. So a line whose slope is one above the measured one, through the highest sample, is above it.
    """
    far = 1 << 20
    most = next((t for t in (4096, 8192, 16384) if num_bytes(t) == num_bytes(far)), far)
    slope = -(-(num_bytes(most) - num_bytes(most // 2)) // (most // 2)) + 1
    samples = [*range(1, 65), *(1 << n for n in range(7, most.bit_length()))]
    offset = max(0, max(num_bytes(t) - slope * t for t in samples)) + MARGIN_BYTES
    offset += -offset % 64
    if isinstance(rows, int):
        return slope * min(rows, most) + offset
    return f"min({rows}, {most})*{slope} + {offset}"
