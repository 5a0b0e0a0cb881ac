"""An ONNX file as a graph of ours: read, run once, written as a torch module, its MoE blocks lifted, and traced.

The inputs and outputs are those of the file, in its order; dimensions that the file leaves open are symbolic.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental import _config as fx_config

import moec.passes.ir.ops  # noqa: F401  (registers torch.ops.moec)
from moec.compiler.capture.captured import Captured, ModelInfo
from moec.compiler.capture.compare import compare_at
from moec.compiler.capture.graph import adopt, expert_layers, small_size_guards, symbol_names
from moec.compiler.capture.lifting import Swapped, refusal_texts, swap_blocks
from moec.compiler.capture.module import LETTERS, MAX_SIZE
from moec.compiler.capture.onnx.code import Written, write_module
from moec.compiler.capture.onnx.examples import (
    FIRST,
    SECOND,
    given_inputs,
    make_inputs,
    open_dimensions,
    sizes_for,
    sizes_of,
    terms,
    with_sizes,
)
from moec.compiler.capture.onnx.file import read_graph
from moec.compiler.capture.onnx.gates import split_gates
from moec.compiler.capture.onnx.graph import Graph
from moec.compiler.capture.onnx.observe import check_operators, inline_branches, observe
from moec.compiler.capture.onnx.prepare import prepare
from moec.compiler.capture.onnx.regions import Region, regions
from moec.compiler.capture.refusal import refusal
from moec.compiler.capture.tensors import constants_of, sources_of
from moec.compiler.errors import CheckpointError, CompileError, UnsupportedModel
from moec.compiler.export.engine import evidence_json
from moec.passes.infra.base import PassContext, layer_of
from moec.passes.infra.runner import run_passes
from moec.passes.ir.weights import Weight, source
from moec.passes.lift_experts import LiftExperts

log = logging.getLogger(__name__)
COMPARED = (1, 2, 7)
OTHERS = 3  # the size of the other dimensions while one alone is 1


def capture_onnx(path: Path, example_inputs: Sequence[Any] | None = None, dtype: torch.dtype | None = None) -> Captured:
    """Captures an ONNX file.

    Args: example_inputs: one call's tensors; None: made from the shapes that the file gives.
          dtype: that the file's weights are expected to have; None: any.
    Raises: CheckpointError: the file is damaged, or its external data lies elsewhere.  UnsupportedModel: names the
        operator, or the block with experts, that cannot be read.  CompileError: the weights have another dtype.
    """
    captured = _captured(path, example_inputs)
    if dtype not in (None, captured.info.dtype):
        raise CompileError(
            f"{path.name}: its weights are {captured.info.dtype}, asked for is {dtype}; an ONNX file keeps its own: "
            "leave --weights out, or export the model in that dtype"
        )
    return captured


def _captured(path: Path, example_inputs: Sequence[Any] | None) -> Captured:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    prepared = prepare(read_graph(path))
    graph = prepared.graph
    check_operators(graph)
    values = make_inputs(graph, sizes_for(graph, FIRST))
    if example_inputs is not None:
        values = given_inputs(graph, example_inputs)
    others = with_sizes(graph, values, _other_sizes(sizes_of(graph, values)))
    if example_inputs is None:
        others = make_inputs(graph, sizes_for(graph, SECOND))
    runs = [observe(graph, values), observe(graph, others)]
    graph = inline_branches(graph, runs)
    found = regions(graph, runs)
    return _Tracer(graph, prepared.recipes, values, write_module(graph, found), found).captured()


def _other_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    return {n: s + 1 + i for i, (n, s) in enumerate(sizes.items())}


@dataclasses.dataclass(frozen=True)
class _Tracer:
    """From the written module to Captured."""

    graph: Graph
    recipes: dict[str, Weight]
    values: dict[str, Tensor]
    written: Written
    found: list[Region]

    def captured(self) -> Captured:
        inputs, swapped = tuple(self.values.values()), None
        if self.found:
            with torch.no_grad():
                swapped = swap_blocks(self.written.module, inputs, self.written.blocks)
            for text in refusal_texts(swapped):
                log.info("%s: %s", self.graph.name, text)
        program = self._traced(swapped)
        gm, tensors = self._adopted(program, swapped)
        captured = Captured(
            graph_module=gm,
            kind="module",
            info=self._info(gm),
            read=lambda name: tensors[name].detach(),
            moe_layers=expert_layers(gm),
            symbols=symbol_names(gm, self._letters()),
            guards=small_size_guards(program),
            certificates=swapped.certificates if swapped else (),
        )
        self._compare(captured)
        return _experts_of_the_rest(captured, refusal_texts(swapped) if swapped else [])

    def _traced(self, swapped: Swapped | None) -> ExportedProgram:
        """Raises: UnsupportedModel: sizes follow from values (experts that were not lifted), or one is fixed."""
        model = swapped.model if swapped else self.written.module
        sums = any(isinstance(s, str) and len(terms(s)) > 1 for i in self.graph.inputs for s in i.shape)
        attempts = [self._automatic()] if sums else [self._dims(1), self._dims(2)]
        first: Exception | None = None
        for dims in attempts:
            try:
                with torch.no_grad(), fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
                    return torch.export.export(model, tuple(self.values.values()), dynamic_shapes=dims, strict=False)
            except Exception as error:  # whatever a trace raises
                first = first or error
        assert first is not None
        reasons = [str(refusal(self.written.module, first)), *(refusal_texts(swapped) if swapped else [])]
        raise UnsupportedModel("; ".join(reasons)) from first

    def _dims(self, smallest: int) -> tuple[dict[int, Any], ...]:
        made = {n: Dim(_letter(i), min=smallest, max=MAX_SIZE) for i, n in enumerate(open_dimensions(self.graph))}
        return tuple({d: made[s] for d, s in enumerate(i.shape) if isinstance(s, str)} for i in self.graph.inputs)

    def _automatic(self) -> tuple[dict[int, Any], ...]:
        """For dimensions that are sums of others: the trace finds how they depend on each other."""
        return tuple({d: Dim.AUTO for d, s in enumerate(i.shape) if isinstance(s, str)} for i in self.graph.inputs)

    def _letters(self) -> dict[tuple[str, int], str]:
        letters = {n: _letter(i) for i, n in enumerate(open_dimensions(self.graph))}
        return {
            (name, d): letters[s]
            for name, given in zip(self.written.inputs, self.graph.inputs, strict=True)
            for d, s in enumerate(given.shape)
            if isinstance(s, str) and s in letters
        }

    def _adopted(self, program: ExportedProgram, swapped: Swapped | None) -> tuple[GraphModule, dict[str, Tensor]]:
        """The graph, and what its weights read by name."""
        constants = self.graph.constants
        tensors = constants_of(program) | constants
        weights = sources_of(constants_of(program))
        for attribute, name in self.written.constants.items():
            own = constants[name]
            weights[attribute] = self.recipes.get(name) or source(name, tuple(own.shape), own.dtype)
        if swapped:
            tensors |= swapped.tensors
            weights |= {n: self._in_file(w) for n, w in swapped.weights.items()}
        try:
            return adopt(program, self.written.inputs, weights), tensors
        except UnsupportedModel as error:
            reasons = refusal_texts(swapped) if swapped else []
            raise UnsupportedModel("; ".join([f"{self.graph.name}: {error}", *reasons])) from error

    def _in_file(self, weight: Weight) -> Weight:
        """A lifted block's recipe over the file's own tensors."""
        if weight.op == "source":
            name = self.written.constants.get(weight.args[0])
            if name is None:
                return weight
            return self.recipes.get(name) or dataclasses.replace(weight, args=(name,))
        return dataclasses.replace(weight, inputs=tuple(self._in_file(w) for w in weight.inputs))

    def _info(self, gm: GraphModule) -> ModelInfo:
        dtypes = [p.dtype for p in self.written.module.parameters() if p.dim() > 1]
        layers = [n.layer for n in self.graph.nodes if n.layer is not None]
        names = {"inputs": [i.name for i in self.graph.inputs], "outputs": list(self.graph.outputs)}
        dims = {i.name: list(i.shape) for i in self.graph.inputs}
        return ModelInfo(
            model_type="onnx",
            layers=len(set(layers)),
            dtype=max(set(dtypes), key=dtypes.count) if dtypes else torch.float32,
            config={"onnx": {**names, "dimensions": dims, "opset": self.graph.opset, "file": self.graph.name}},
        )

    def _compare(self, captured: Captured) -> None:
        """Against the module as it was written, at other sizes. Raises: UnsupportedModel: they differ."""
        names = open_dimensions(self.graph)
        together = [dict.fromkeys(names, n) for n in COMPARED] if names else [{}]
        alone = [{**dict.fromkeys(names, OTHERS), n: 1} for n in names] if len(names) > 1 else []
        for sizes in [*together, *alone]:
            given = with_sizes(self.graph, self.values, sizes)
            compare_at(self.written.module, captured, tuple(given.values()), sizes)


def _experts_of_the_rest(captured: Captured, refused: Sequence[str]) -> Captured:
    """Experts that were not lifted by measurement are read from the graph; says so where there are none."""
    context = PassContext(read=captured.read)
    result = run_passes(captured.graph_module, (LiftExperts(),), context, evidence="sampled")
    split_gates(result.graph)
    calls = result.graph.graph.find_nodes(op="call_function", target=torch.ops.moec.experts.default)
    for place, node in enumerate(calls):
        node.meta["layer"] = place if layer_of(node) is None else layer_of(node)
    if not calls:
        reasons = [*refused, *(f"{r.node}: {r.reason}" for r in result.ledgers[LiftExperts.name].refused)]
        told = f" ({'; '.join(reasons[:3])})" if reasons else ""
        name = captured.info.config["onnx"]["file"]
        log.warning("%s: no layer with experts was found%s; it is compiled as it is", name, told)
    return dataclasses.replace(
        captured,
        moe_layers=expert_layers(result.graph),
        certificates=(*captured.certificates, *map(evidence_json, result.evidence)),
    )


def _letter(place: int) -> str:
    return LETTERS[place] if place < len(LETTERS) else f"D{place}"
