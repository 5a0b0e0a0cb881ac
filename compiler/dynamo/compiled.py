"""One compiled graph of Dynamo's: programs by the weights that they were made for.

Dynamo reuses a graph for other modules of the same class, and lets users change parameters. So every call compares its
parameters with those that the program in use has packed: the same objects, at the same address, with the same version.
Changes that bypass the version counter of autograd (`p.data.copy_()`) are not seen: call torch.compiler.reset() then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moec.compiler.api import lowered_of, quiet
from moec.compiler.capture.module import capture_module
from moec.compiler.dynamo.graph import DynamoGraph, Result
from moec.compiler.errors import UnsupportedModel
from moec.compiler.in_process import executor_of
from moec.compiler.options import CompileOptions
from moec.passes.ir import ops
from moec.passes.ir.copies import copy_of
from moec.runtime.executor import Executor

MOST_CHANGES = 4
"""Times that the same parameters may change before the graph runs in eager mode: packing costs seconds."""

EXPERTS = (ops.experts._opoverload, ops.combine_gemm._opoverload)
State = tuple[tuple[int, int], ...]


@dataclasses.dataclass
class _Entry:
    """A program and the weights that it is for. state: their versions and addresses when they were packed."""

    owners: tuple[weakref.ref[Tensor], ...]
    state: State
    executor: Executor
    changes: int = 0

    def is_for(self, weights: Sequence[Tensor]) -> bool:
        return all(ref() is w for ref, w in zip(self.owners, weights, strict=True))


class CompiledGraph:
    """A function of the arguments of Dynamo's graph that gives its outputs.

    symbols: names of the symbolic sizes.  num_experts: layers of experts that were found.
    Raises: UnsupportedModel, PassError, EngineError: the graph cannot be compiled.
    """

    def __init__(
        self,
        graph: DynamoGraph,
        arguments: Sequence[Any],
        options: CompileOptions,
        eager: Callable[..., Sequence[Any]],
        say: Callable[[str], None],
    ) -> None:
        self._graph, self._options, self._eager, self._say = graph, options, eager, say
        weights = [arguments[i] for i in graph.weights]
        if any(w.is_inference() for w in weights):
            raise UnsupportedModel("weights made in inference mode: changes to them cannot be seen; clone them outside")
        inputs = tuple(_dense(arguments[i]).clone() for i in graph.inputs)  # a trace may write to them
        with contextlib.redirect_stderr(io.StringIO()):  # where graphs print what they do not take
            self._captured = capture_module(graph.module, inputs, graph.dims)
        self.symbols = tuple(sorted(set(self._captured.symbols.values())))
        self._entries: dict[tuple[int, ...], _Entry] = {}
        self.num_experts = 0
        self._last = self._build(weights, options.verify)

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        graph = self._graph
        entry = self._entry_for([arguments[i] for i in graph.weights])
        if entry is None:
            return self._eager(*arguments)
        values = entry.executor.ordinary([_dense(arguments[i]) for i in graph.inputs])
        return [_result(r, values, arguments) for r in graph.results]

    def _entry_for(self, weights: Sequence[Tensor]) -> _Entry | None:
        """The program for these weights as they are now; None where they change too often."""
        entry = self._last
        if not entry.is_for(weights):
            found = self._entries.get(tuple(map(id, weights)))
            entry = found if found is not None and found.is_for(weights) else self._build(weights)
        if entry.changes <= MOST_CHANGES and entry.state != _state(weights):
            entry = self._rebuild(entry, weights)
        self._last = entry
        return entry if entry.changes <= MOST_CHANGES else None

    def _rebuild(self, entry: _Entry, weights: Sequence[Tensor]) -> _Entry:
        """The entry with weights packed again; the last of its changes is only counted."""
        changes = entry.changes + 1
        if changes > MOST_CHANGES:
            self._say(f"weights changed {changes} times between calls: a graph runs in eager mode from now on")
        else:
            entry = self._build(weights)
        entry.changes = changes
        return entry

    def _build(self, weights: Sequence[Tensor], verify: str = "off") -> _Entry:
        """Lowers the captured graph for weights, which take the places of those that it was captured with."""
        held = dict(zip(self._graph.names, (w.detach() for w in weights), strict=True))
        first = self._captured.read

        def read(name: str) -> Tensor:
            return held[name] if name in held else first(name)

        options = dataclasses.replace(self._options, verify=verify)
        copied = dataclasses.replace(self._captured, graph_module=copy_of(self._captured.graph_module), read=read)
        lowered = lowered_of(copied, options, quiet)[2]
        self.num_experts = sum(c.site.node.target in EXPERTS for c in lowered.choices)
        executor = executor_of(lowered, read, options, quiet)
        for key in [k for k, e in self._entries.items() if any(ref() is None for ref in e.owners)]:
            del self._entries[key]
        entry = _Entry(tuple(map(weakref.ref, weights)), _state(weights), executor)
        self._entries[tuple(map(id, weights))] = entry
        return entry


def _state(weights: Sequence[Tensor]) -> State:
    return tuple([(w._version, w.data_ptr()) for w in weights])


def _dense(tensor: Tensor | int) -> Tensor:
    """What kernels take: dense in memory, without a history. A number becomes the empty tensor [number, 0]."""
    if not isinstance(tensor, Tensor):
        number = tensor.node.hint if isinstance(tensor, torch.SymInt) else tensor  # asking for it would fix it
        return torch.empty((number, 0))
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _result(result: Result, values: Sequence[Tensor], arguments: Sequence[Any]) -> Any:
    if result.kind == "value":
        value = values[result.index]
        return value.contiguous() if result.contiguous else value
    if result.number is not None:
        return result.number.of(arguments)
    return arguments[result.index] if result.kind == "input" else result.constant
