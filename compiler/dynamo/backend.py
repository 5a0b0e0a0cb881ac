"""The backend that torch.compile(model, backend="moec") finds through the entry point `torch_dynamo_backends`.

Each graph that Dynamo hands over is captured, rewritten, lowered and run like any model of moec, in this process: no
engine directory is written. What cannot be compiled runs as Dynamo's graph in eager mode, and the log says why, once
for each reason: training, other devices, graphs that write to their inputs. Between graph breaks Python runs as before.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from moec.compiler.dynamo.compiled import CompiledGraph
from moec.compiler.dynamo.graph import is_weight, read_graph
from moec.compiler.dynamo.symbols import restart_if_fixed
from moec.compiler.errors import CompileError, UnsupportedModel
from moec.compiler.options import CompileOptions
from moec.passes.infra.errors import PassError
from moec.runtime.errors import EngineError

log = logging.getLogger(__name__)
OPTIONS = ("dump", "target", "verify", "weights")

Compiled = Callable[..., Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Record:
    """One call of the backend. nodes: calls in Dynamo's graph. experts: of these, layers that became moec::experts.

    dynamic: the names of its symbolic sizes. reason: why it runs in eager mode, "" where it is compiled.
    """

    nodes: int
    experts: int
    dynamic: tuple[str, ...]
    reason: str


class Backend:
    """A Dynamo backend. records: what became of each graph since the last torch.compiler.reset()."""

    __name__ = "moec"
    _tags: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._said: set[str] = set()

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Compiled:
        """Compiles one graph of Dynamo's.

        Args:     gm: placeholders are tensors, parameters among them, and sizes; the output is a tuple.
                  example_inputs: a real tensor or a number for each placeholder.
                  options: target, weights (formats), verify, dump: as of moec.compile; verify is "sampled" by default.
        Returns:  a function of the same inputs that gives a sequence with the values of gm's output.
        Raises:   CompileError: an option that has no meaning. What cannot be compiled runs in eager mode.
        """
        chosen = _options(mode, options)
        nodes = sum(n.op.startswith("call_") for n in gm.graph.nodes)
        try:
            compiled = self._compile(gm, example_inputs, chosen)
        except (CompileError, PassError, EngineError) as error:
            reason = str(error)
            self.records.append(Record(nodes, 0, (), reason))
            self._say(f"a graph of {nodes} calls runs in eager mode: {reason}")
            log.debug("the refusal in full", exc_info=error)
            return gm.forward
        self.records.append(Record(nodes, compiled.num_experts, compiled.symbols, ""))
        return compiled

    def reset(self) -> None:
        """Forgets the records; Dynamo calls it from torch.compiler.reset()."""
        self.records.clear()
        self._said.clear()

    def _compile(self, gm: GraphModule, arguments: Sequence[Any], options: CompileOptions) -> CompiledGraph:
        _check_mode(arguments)
        placeholders = zip(gm.graph.find_nodes(op="placeholder"), arguments, strict=True)
        restart_if_fixed([(n, a) for n, a in placeholders if isinstance(a, Tensor) and not is_weight(n, a)])
        # Dynamo's own trace is under way: its fake tensors must not meet those of ours
        with torch._guards.tracing(None), torch.inference_mode(False), torch.no_grad():
            return CompiledGraph(read_graph(gm, arguments), arguments, options, gm.forward, self._say)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)


def _options(mode: str | None, options: Mapping[str, Any] | None) -> CompileOptions:
    given = dict(options or {})
    unknown = [k for k in given if k not in OPTIONS]
    if mode is not None or unknown:
        what = f"mode={mode!r}" if mode is not None else f"option {unknown[0]!r}"
        raise CompileError(f"torch.compile: the backend moec has no {what}; known options: {', '.join(OPTIONS)}")
    made = CompileOptions.of(
        given.get("target", "cpu"), given.get("weights"), given.get("verify", "sampled"), given.get("dump")
    )
    if made.arch is not None:
        raise CompileError(f"torch.compile: target={given['target']!r}; this backend runs in the process, on its CPU")
    if made.dtype is not None or made.weights.is_auto:
        raise CompileError(
            "torch.compile: weights names formats of the experts (int8, int4, ..); cast the module instead"
        )
    return made


def _check_mode(arguments: Sequence[Any]) -> None:
    """Raises UnsupportedModel where gradients are wanted or autocast is on: the engine has neither."""
    trained = sum(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    if torch.is_grad_enabled() and trained:
        raise UnsupportedModel(
            f"training: {trained} of its inputs require gradients; call the model under torch.no_grad() to compile it"
        )
    if torch.is_autocast_enabled("cpu"):
        raise UnsupportedModel("autocast is on; cast the module instead")


backend = Backend()
