"""The text of a program's run function: a line per step, and the objects that its names stand for.

The source holds only names made here (b<id> a buffer, f<n> a function, k<n> a constant), whole numbers and checked size
expressions, so that nothing in an engine's files becomes code. A step costs its call and nothing more.
"""

from __future__ import annotations

import dataclasses
import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moec.runtime.constants import CPU, DEVICES, decode_constant, torch_dtype
from moec.runtime.errors import FormatError, InputError
from moec.runtime.expressions import to_source
from moec.runtime.launch.aten import operator
from moec.runtime.launch.library import LIBRARY, NEEDS_BATCH, NEEDS_WEIGHTS
from moec.runtime.program import Program, Step, buffers_in

_SYMBOL = re.compile(r"[A-Z][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a program's tensors are.

    kind: "cpu" or "cuda".  multiprocessors: of a GPU.  synchronise: waits until the device is idle.
    memory: what is free of it, in words.
    """

    device: torch.device = CPU
    kind: str = "cpu"
    multiprocessors: int = 0
    synchronise: Callable[[], None] = lambda: None
    memory: Callable[[], str] = lambda: ""


ON_CPU = Place()


class ProgramSource:
    """The text of the run function and the objects that its names stand for."""

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Tensor | None],
        kernels: Mapping[str, Callable[..., Any]],
        to_kernel: Callable[[Tensor], Any],
        timed: bool,
        collective: Callable[[Step], Callable[..., Any]] | None,
        place: Place,
    ) -> None:
        self.program, self.kernels, self.timed, self.collective = program, kernels, timed, collective
        self.place = place
        self.to_kernel = to_kernel
        self.namespace: dict[str, Any] = {"empty": torch.empty, "min": min, "max": max, "__builtins__": {}}
        self.steps: list[Step] = []
        self.counting: list[Any] = []
        for i, b in enumerate(program.buffers):
            if b.kind == "weight":
                weight = weights[b.name]
                if weight is None:
                    raise FormatError(f"weight {b.name} of the program is not in the weights file; compile it again")
                self.namespace[f"b{i}"], self.namespace[f"t{i}"] = weight, to_kernel(weight)
            elif b.kind == "zeros":
                zeros = torch.zeros([int(d) for d in b.shape], dtype=torch_dtype(b.dtype), device=place.device)
                self.namespace[f"b{i}"], self.namespace[f"t{i}"] = zeros, to_kernel(zeros)
        self.arena = [i for i, b in enumerate(program.buffers) if b.kind == "arena"]
        self.views = [o for s in program.views for o in s.outputs if o is not None]
        self.arena_symbols = self._symbols_of_arena()
        self.lines = [*self._views(), *self._header()]
        self.header_lines = len(self.lines)
        self._emit(program.steps, "    ")
        self.lines.append(f"    return [{', '.join(f'b{i}' for i in program.outputs)}]")
        self.text = "\n".join(self.lines) + "\n"

    def _symbols_of_arena(self) -> list[str]:
        """The symbols that the arena's sizes depend on: others may change without new views."""
        p = self.program
        sizes = [str((p.buffers[i].shape, p.buffers[i].offset)) for i in self.arena]
        words = set(re.findall(r"\w+", " ".join([*sizes, str(p.arena_bytes), *(str(s.args) for s in p.views)])))
        return [s for s in p.symbols if s in words]

    def _views(self) -> list[str]:
        """The function that makes the views of the arena's buffers."""
        p = self.program
        for step in p.views:
            if step.kind != "aten" or any(o is not None and p.buffers[o].kind != "view" for o in step.outputs):
                raise FormatError(f"program.json: {step.node} is no view of the arena")
        lines = [f"def views({', '.join(['arena', *self.arena_symbols])}):"]
        if self.arena:
            lines.append(f"    {', '.join(f'b{i}' for i in self.arena)}, = arena")
        lines += [f"    {self._call(step)}" for step in p.views]
        return [*lines, f"    return [{', '.join(f'b{i}' for i in self.views)}]"]

    def _header(self) -> list[str]:
        p = self.program
        lines = [f"def run(inputs, batch{', clock' if self.timed else ''}):"]
        if p.inputs:
            lines.append(f"    {', '.join(f'b{i}' for i in p.inputs)}, = inputs")
        for symbol in p.symbols:
            if not _SYMBOL.fullmatch(symbol) or keyword.iskeyword(symbol):
                raise FormatError(f"program.json: {symbol!r} is no name for a size; expected {_SYMBOL.pattern}")
            homes = [(i, p.buffers[i].shape.index(symbol)) for i in p.inputs if symbol in p.buffers[i].shape]
            if not homes:
                raise FormatError(f"program.json: no input has the size {symbol}; make the engine again")
            lines.append(f"    {symbol} = b{homes[0][0]}.shape[{homes[0][1]}]")
        if self.arena:
            names = [f"{form}{i}" for form in "bt" for i in (*self.arena, *self.views)]
            lines.append(f"    {', '.join(names)}, = frame(({''.join(f'{s}, ' for s in self.arena_symbols)}))")
        if self.timed:
            lines.append("    clock(-1)")
        return lines

    def _emit(self, steps: Sequence[Step], indent: str) -> None:
        for step in steps:
            if step.kind == "choose":
                self._emit_choose(step, indent)
            else:
                self._line(step, indent, self._call(step))
        if not steps:
            self.lines.append(f"{indent}pass")

    def _emit_choose(self, step: Step, indent: str) -> None:
        if step.symbol not in self.program.symbols:
            raise FormatError(f"program.json: step {step.node} chooses by {step.symbol!r}, which is no symbol")
        for n, (limit, inner) in enumerate(step.variants):
            test = "else:" if limit is None else f"{'elif' if n else 'if'} {step.symbol} <= {int(limit)}:"
            self.lines.append(indent + ("if True:" if limit is None and not n else test))
            self.steps.append(step)
            self._emit(inner, indent + "    ")
        self._line(step, indent, "pass")

    def _line(self, step: Step, indent: str, text: str) -> None:
        if step.dies:
            text += f"; del {', '.join(f'b{int(i)}' for i in step.dies)}"
        if self.timed:
            text += f"; clock({len(self.steps)})"
        self.lines.append(indent + text)
        self.steps.append(step)

    def _call(self, step: Step) -> str:
        args = [self._argument(a) for a in step.args]
        if step.kind == "aten":
            args += [f"{self._keyword(k)}={self._argument(v)}" for k, v in step.kwargs.items()]
            call = f"{self._bind('f', operator(step.name, bool(step.kwargs)))}({', '.join(args)})"
        elif step.kind == "library":
            args = ["batch", *args] if step.name in NEEDS_BATCH else args
            call = f"{self._bind('f', self._library(step))}({', '.join(args)})"
        elif step.kind == "collective":
            if self.collective is None:
                raise FormatError(f"step {step.node} is a collective, and the engine has one rank; compile it again")
            call = f"{self._bind('f', self.collective(step))}({', '.join(args)})"
        else:
            if step.name not in self.kernels:
                raise FormatError(f"step {step.node} calls kernel {step.name}, which no kernel library has")
            made = "".join(
                f"b{i} = {self._allocation(i)}; " for i in step.outputs if i is not None and self._is_fresh(i)
            )
            function: Any = self.kernels[step.name]
            if step.kwargs:
                function = function.ordered(tuple(step.kwargs))
            args = [self._kernel_argument(a) for a in (*step.args, *step.kwargs.values())]
            return f"{made}{self._bind('f', function)}({', '.join(args)})"
        if step.tuple_result:
            return f"{', '.join('_' if i is None else f'b{i}' for i in step.outputs)}, = {call}"
        if len(step.outputs) > 1:
            raise FormatError(f"program.json: step {step.node} binds {len(step.outputs)} outputs to one result")
        return f"b{step.outputs[0]} = {call}" if step.outputs and step.outputs[0] is not None else call

    def _library(self, step: Step) -> Callable[..., Any]:
        if step.name not in LIBRARY:
            raise FormatError(
                f"step {step.node} calls library kernel {step.name!r}, unknown to this runtime; update moec"
            )
        constants = dict(step.kwargs)
        if step.name in NEEDS_WEIGHTS:
            constants["weights"] = [self._weight(a) for a in step.args]
        try:
            function = LIBRARY[step.name](**constants)
        except TypeError as error:
            raise FormatError(f"step {step.node}: constants {step.kwargs} do not fit {step.name}: {error}") from error
        self.counting += [function] if hasattr(function, "counters") else []
        return function

    def set_weight(self, name: str, tensor: Tensor) -> bool:
        """As Executor.set_weight, for one form of the program."""
        found = [i for i, b in enumerate(self.program.buffers) if b.kind == "weight" and b.name == name]
        for i in found:
            old = self.namespace[f"b{i}"]
            if old.shape != tensor.shape or old.dtype != tensor.dtype:
                raise InputError(
                    f"weight {name} is {old.dtype} {list(old.shape)}, not {tensor.dtype} {list(tensor.shape)}"
                )
            self.namespace[f"b{i}"], self.namespace[f"t{i}"] = tensor, self.to_kernel(tensor)
        return bool(found)

    def _weight(self, a: Any) -> Tensor | None:
        """The tensor of an argument that is a weight, None for others."""
        ids = buffers_in(a)
        return self.namespace[f"b{ids[0]}"] if ids and self.program.buffers[ids[0]].kind == "weight" else None

    def _is_fresh(self, buffer_id: int) -> bool:
        """Whether a kernel's result is allocated by its step, and does not lie in the arena."""
        return self.program.buffers[buffer_id].kind == "value"

    def _allocation(self, buffer_id: int) -> str:
        b = self.program.buffers[buffer_id]
        shape = ", ".join(to_source(d, self.program.symbols) for d in b.shape)
        where = "" if self.place.device == CPU else f", device={self._bind('k', self.place.device)}"
        return f"empty(({shape}{',' if b.shape else ''}), dtype={self._bind('k', torch_dtype(b.dtype))}{where})"

    def _argument(self, a: Any) -> str:
        if a is None or isinstance(a, bool):
            return repr(a)
        if isinstance(a, int):
            return f"({a})" if a < 0 else str(a)
        if isinstance(a, dict) and "buffer" in a:
            return f"b{int(a['buffer'])}"
        if isinstance(a, dict) and "size" in a:
            return to_source(a["size"], self.program.symbols)
        if isinstance(a, list | tuple):
            return f"[{', '.join(self._argument(x) for x in a)}]"
        if isinstance(a, dict) and "multiprocessors" in a:
            return str(int(a["multiprocessors"]) * self.place.multiprocessors)
        return self._bind("k", decode_constant(a, {**DEVICES, self.place.kind: self.place.device}))

    def _kernel_argument(self, a: Any) -> str:
        """Weights, arena buffers, their views and zeros in the form that was made for kernels, all else as it is."""
        for buffer_id in buffers_in(a):
            if self.program.buffers[buffer_id].kind in ("weight", "arena", "view", "zeros"):
                return f"t{buffer_id}"
        return self._argument(a)

    def _keyword(self, name: str) -> str:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise FormatError(f"program.json: {name!r} is no argument name")
        return name

    def _bind(self, prefix: str, value: Any) -> str:
        name = f"{prefix}{len(self.namespace)}"
        self.namespace[name] = value
        return name
