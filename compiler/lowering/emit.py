"""From a graph to a program: one step per call or per recognised layer, sizes as expressions, memory planned."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from moec.compiler.capture.captured import Captured
from moec.compiler.codegen.cuda_archs import Architecture
from moec.compiler.errors import CompileError
from moec.compiler.lowering.arena import plan_memory
from moec.compiler.lowering.candidates import Candidate, nothing
from moec.compiler.lowering.collectives import collective_step, is_collective
from moec.compiler.lowering.select import Choice, choose, settled
from moec.compiler.lowering.tail import ROWS, ROWS_SYMBOL, TOKENS_SYMBOL, output_tail
from moec.compiler.lowering.targets import Target, cpu_target, cuda_target
from moec.compiler.lowering.tuned import Tuning
from moec.compiler.lowering.writer import UnsupportedOperator, Writer, split_arguments
from moec.passes.ir.weights import Weight
from moec.passes.placing.exchange import is_sizes
from moec.runtime.launch.aten import is_allowed
from moec.runtime.launch.library import LIBRARY
from moec.runtime.program import Program, Step


@dataclasses.dataclass(frozen=True)
class Lowered:
    """program: for one rank.  weights: buffer name -> how to make it, in the order of first use.

    choices: what was chosen at each site, and why.  kernels: those that the program calls, by symbol.
    """

    program: Program
    weights: dict[str, Weight]
    choices: tuple[Choice, ...]
    kernels: dict[str, Candidate]


def lower(
    captured: Captured,
    level: str | None = None,
    arch: Architecture | None = None,
    tuning: Tuning | None = None,
    fast_combine: bool = False,
) -> Lowered:
    """The program of a captured (and usually rewritten) graph.

    level: instruction-set level that kernels may use; None: library kernels only.  arch: of a GPU, for a program of
    CUDA kernels and torch's operators on the device; its launches are fitted by lowering/cuda/build.py.
    tuning: configures the chosen kernels by ranges of T.  fast_combine: of a GPU, sums of experts in no fixed order.
    Raises: UnsupportedOperator: a node that the runtime has no step for.  CompileError: a pass fixed a symbolic size.
    """
    tail = output_tail(captured.graph_module.graph) if captured.kind == "language_model" else []
    target = cpu_target(level) if arch is None else cuda_target(arch, fast_combine)
    return _Emitter(captured.graph_module, captured.symbols, target, tail, tuning).lower()


class _Emitter:
    def __init__(
        self,
        gm: fx.GraphModule,
        symbols: dict[str, str],
        target: Target,
        tail: list[fx.Node],
        tuning: Tuning | None = None,
    ) -> None:
        self.gm, self.target, self.tail, self.tuning = gm, target, tail, tuning
        self.writer, self.traced = Writer(gm, symbols, target.device), symbols
        self.buffers = self.writer.buffers
        self.bound = {s for p in gm.graph.find_nodes(op="placeholder") for s in _symbols(p.meta["val"])}
        self.choices: list[Choice] = []

    def lower(self) -> Lowered:
        *nodes, end = (n for n in self.gm.graph.nodes if n not in self.tail)
        chosen = {
            n: choose(site, self.tuning)
            for n in [*nodes, *self.tail]
            if n.op == "call_function" and not self._is_open(n) and (site := self.target.site_of(n))
        }
        chosen = settled(chosen)
        covered = {inner for choice in chosen.values() for inner in choice.site.covers}
        inputs: list[int] = []
        for node in [*nodes, *self.tail]:
            if self.tail and node is self.tail[0]:
                inputs.append(self._select_rows(node.args[0]))
            if node.op == "placeholder":
                inputs.append(self.buffers.add(node, "input", node.meta["val"]))
            elif node.op == "call_function" and node not in covered:
                self._site(chosen[node]) if node in chosen else self._call(node)
            elif node.op == "get_attr" and self.writer.weight_of(node) is None:
                raise UnsupportedOperator(f"node {node.name}: the attribute {node.target} is no weight of the graph")
            elif node.op not in ("call_function", "get_attr"):
                raise UnsupportedOperator(f"node {node.name}: {node.op} {node.target} cannot be a step of a program")
        values = end.args[0] if isinstance(end.args[0], list | tuple) else [end.args[0]]
        outputs = [self.writer.tensor(v)["buffer"] for v in values]
        symbols = self._symbols(inputs)
        steps = tuple(self.writer.steps)
        program = Program(symbols, tuple(self.buffers.all), tuple(inputs), tuple(outputs), steps)
        program = plan_memory(program, "T" if "T" in symbols else next(iter(symbols), None))
        kernels = {s: c for choice in self.choices for c in choice.kernels for s in c.symbols}
        return Lowered(program, self.writer.weights, tuple(self.choices), kernels)

    def _is_open(self, node: fx.Node) -> bool:
        """Whether a value has a size that no input has: rows that an all-to-all brings. Only torch allocates for it."""
        val = node.meta.get("val")
        return isinstance(val, torch.Tensor) and not _symbols(val) <= self.bound

    def _select_rows(self, hidden: fx.Node) -> int:
        """From here on the rows are those of the new input, which is returned."""
        rows = self.buffers.add_shape(ROWS, "int64", (ROWS_SYMBOL,), "input")
        args = (self.writer.tensor(hidden), {"buffer": rows})
        traced = self.buffers.symbols
        self.buffers.symbols = {s: ROWS_SYMBOL if name == TOKENS_SYMBOL else name for s, name in traced.items()}
        kept, _ = self.writer.results(hidden)
        self.writer.steps.append(Step("library", "select_rows", hidden.name, args, outputs=kept))
        return rows

    def _symbols(self, inputs: Sequence[int]) -> tuple[str, ...]:
        """The symbols that are a dimension of an input: those that the runtime can know."""
        known = {d for i in inputs for d in self.buffers.all[i].shape}
        wanted = {*self.traced.values(), ROWS_SYMBOL}
        if "T" in wanted and "T" not in known:
            raise CompileError("a pass fixed the number of tokens to the one that was traced; report it as a defect")
        return tuple(sorted(wanted & known))

    def _call(self, node: fx.Node) -> None:
        val = node.meta.get("val")
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            if isinstance(node.args[0].meta.get("val"), list | tuple) and node.users:
                self.buffers.alias(node, node.args[0], node.args[1])
            return
        if isinstance(val, int | float | bool | torch.SymInt) or is_sizes(node):
            return  # sizes are expressions, or numbers of rows, where they are used
        if is_collective(node):
            self.writer.steps.append(collective_step(self.writer, node))
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            raise UnsupportedOperator(f"node {node.name}: {node.target} cannot be a step of a program")
        namespace, name = node.target._schema.name.split("::")
        full = f"aten.{name}.{node.target._overloadname}"
        if namespace == "moec" and name in LIBRARY and name in self.target.library:
            tensors, constants = split_arguments(node)
            args = tuple(self.writer.encode(a, node) for a in tensors)
            if "body" in constants:
                constants["body"] = json.loads(constants["body"])  # readable in program.json
            self.writer.steps.append(Step("library", name, node.name, args, constants, *self.writer.results(node)))
        elif namespace == "aten" and is_allowed(full):
            args = tuple(self.writer.encode(a, node) for a in node.args)
            kwargs: dict[str, Any] = {k: v for k, v in node.kwargs.items() if v is not None and k != "pin_memory"}
            kwargs = self.writer.placed(node, {k: self.writer.encode(v, node) for k, v in kwargs.items()})
            self.writer.steps.append(Step("aten", full, node.name, args, kwargs, *self.writer.results(node)))
        else:
            raise UnsupportedOperator(f"node {node.name}: {node.target} {self.target.lacks(namespace)}")

    def _site(self, choice: Choice) -> None:
        """Writes the chosen kernels. Where one of them is compiled, the results lie in the arena, where views are free;
        what the library gives is copied there.
        """
        node, writer = choice.site.node, self.writer
        rows = self._rows(node)
        if isinstance(rows, int):
            choice = choice.at(rows)
        self.choices.append(choice)
        compiled = any(c.symbols or c.write is nothing for c in choice.kernels)
        results, _ = writer.results(node, "arena" if compiled else "value")
        if len(choice.variants) == 1:
            choice.kernels[0].write(writer, results)
            return
        outer, variants = writer.steps, []
        for limit, candidate in choice.variants:
            writer.steps = []
            is_direct = candidate.symbols or candidate.write is nothing
            candidate.write(writer, results) if is_direct else self._copied(candidate, node, results)
            variants.append((limit, tuple(writer.steps)))
        writer.steps = outer
        outer.append(Step("choose", "", node.name, symbol=str(rows), variants=tuple(variants)))

    def _copied(self, candidate: Candidate, node: fx.Node, results: Sequence[int | None]) -> None:
        """Writes a library candidate whose results are copied to the given buffers."""
        several = node.meta["val"] if isinstance(node.meta["val"], list | tuple) else [node.meta["val"]]
        made = [
            None if r is None else self.buffers.fresh(f"{node.name}_made", "value", v, node)
            for r, v in zip(results, several, strict=True)
        ]
        candidate.write(self.writer, made)
        for source, target in zip(made, results, strict=True):
            if source is not None:
                args = ({"buffer": source}, {"buffer": target})
                self.writer.steps.append(Step("library", "copy_into", node.name, args))

    def _rows(self, node: fx.Node) -> int | str:
        """The number of rows where it is fixed, else the symbol that kernels are chosen by."""
        val = node.meta["val"]
        shape = (val[0] if isinstance(val, list | tuple) else val).shape
        rows = self.buffers.size(math.prod(shape[:-1] or shape), node)
        if isinstance(rows, int):
            return rows
        known = list(self.buffers.symbols.values())
        return rows if rows in known else "T" if "T" in known else known[0]


def _symbols(val: torch.Tensor) -> set[Any]:
    """The symbols in a fake tensor's shape."""
    return {s for d in val.shape if isinstance(d, torch.SymInt) for s in d.node.expr.free_symbols}  # type: ignore[attr-defined]
