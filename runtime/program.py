"""The program of one rank: what the compiler hands to the runtime, as plain data that JSON holds.

An argument of a step is None, a bool, an int, a float or a text as it is, a list of arguments, or a one-entry object:
    {"buffer": id}    a tensor                      {"size": "2*T"}        a whole number by expression
    {"dtype": "float32"}  {"device": "cpu"}         {"layout": "strided"}  {"memory_format": "contiguous_format"}
    {"number": "inf" | "-inf" | "nan"}              what JSON cannot write
    {"multiprocessors": n}                          n times the multiprocessors of the GPU
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moec.runtime.errors import FormatError
from moec.runtime.expressions import Size

BUFFER_KINDS = ("input", "weight", "arena", "view", "value", "zeros")
STEP_KINDS = ("aten", "library", "kernel", "choose", "collective")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A tensor of the program. Its id is its place in Program.buffers.

    name: of the graph's value, of the input, or of the tensor in the weights file.  shape: ints and expressions.
    kind: "input", "weight" (mapped from the file), "arena" (placed by the memory plan: its offset is an expression, a
    multiple of 64 bytes), "view" (of arena memory, made by one of Program.views), "value" (allocated by its step),
    "zeros" (of a fixed size, made with the executor; every step that writes it leaves zeros behind).
    """

    name: str
    dtype: str
    shape: tuple[Size, ...]
    kind: str
    offset: Size | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """One thing that the runtime does.

    kind, name: "aten" and an operator of the allow-list ("aten.add.Tensor"); "library" and a function of
        launch/library.py; "kernel" and a symbol of the kernel library; "choose" and ""; "collective" and what it is
        (docs/engine.md: what a rank's program contains).
    args, kwargs: encoded arguments (module docstring). A kernel's outputs and workspaces stand among them; CUDA kernels
        have kwargs, by the names of their parameters, kernels of a library have args.
    outputs: buffers bound to the results, None for a result that nobody reads. A kernel writes its args: its outputs
        are among them, and those of kind "value" are allocated just before the call.
    tuple_result: the operator gives a tuple or list, one entry per output.
    node: the graph node that it came from.  dies: buffers that no later step reads.
    variants: of "choose": (largest value of `symbol` that it serves or None, steps), in rising order, None last.
    """

    kind: str
    name: str
    node: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    outputs: tuple[int | None, ...] = ()
    tuple_result: bool = False
    dies: tuple[int, ...] = ()
    symbol: str = ""
    variants: tuple[tuple[int | None, tuple[Step, ...]], ...] = ()


@dataclasses.dataclass(frozen=True)
class Program:
    """symbols: names of the symbolic sizes, each bound by the shape of an input.  inputs, outputs: buffer ids.

    arena_bytes: size of the arena as an expression, 0 where nothing lives there.
    views: steps that only look at arena memory in another shape; they run once for each set of sizes.
    """

    symbols: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    steps: tuple[Step, ...]
    arena_bytes: Size = 0
    views: tuple[Step, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As program.json holds it; from_json reads it back."""
        return {
            "symbols": list(self.symbols),
            "buffers": [_without_defaults(b) for b in self.buffers],
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "arena_bytes": self.arena_bytes,
            "steps": [_step_to_json(s) for s in self.steps],
            "views": [_step_to_json(s) for s in self.views],
        }

    @classmethod
    def from_json(cls, data: Any) -> Program:
        """Raises: FormatError: a field is missing, of another kind than it should be, or points to no buffer."""
        try:
            buffers = tuple(Buffer(**{**b, "shape": tuple(b["shape"])}) for b in data["buffers"])
            steps, views = (tuple(_step_from_json(s) for s in data[name]) for name in ("steps", "views"))
            program = cls(
                tuple(data["symbols"]),
                buffers,
                tuple(data["inputs"]),
                tuple(data["outputs"]),
                steps,
                data["arena_bytes"],
                views,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"program.json cannot be read ({error!r}); make the engine again") from error
        _check(program)
        return program


def _without_defaults(item: Buffer | Step) -> dict[str, Any]:
    """A dataclass as a dict without the fields that hold their defaults: programs stay short and readable."""
    out = {}
    for f in dataclasses.fields(item):
        value = getattr(item, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if (f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING) or value != default:
            out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def _step_to_json(step: Step) -> dict[str, Any]:
    out = _without_defaults(step)
    if step.variants:
        out["variants"] = [[limit, [_step_to_json(s) for s in steps]] for limit, steps in step.variants]
    return out


def _step_from_json(data: dict[str, Any]) -> Step:
    fields = dict(data)
    for name in ("args", "outputs", "dies"):
        fields[name] = tuple(fields.get(name, ()))
    fields["variants"] = tuple(
        (limit, tuple(_step_from_json(s) for s in steps)) for limit, steps in fields.get("variants", ())
    )
    return Step(**fields)


def buffers_in(argument: Any) -> list[int]:
    """The buffer ids in an encoded argument, in order."""
    if isinstance(argument, list | tuple):
        return [b for a in argument for b in buffers_in(a)]
    if isinstance(argument, dict) and "buffer" in argument:
        return [argument["buffer"]]
    return []


def _check(program: Program) -> None:
    """Raises FormatError where an id is no buffer or a kind is unknown. Symbols and sizes are checked when compiled."""
    count = len(program.buffers)
    for b in program.buffers:
        if b.kind not in BUFFER_KINDS:
            known = ", ".join(BUFFER_KINDS)
            raise FormatError(f"program.json: buffer {b.name} is of kind {b.kind!r}, known: {known}; update moec")
        if b.kind == "zeros" and not all(type(d) is int and d > 0 for d in b.shape):
            raise FormatError(f"program.json: buffer {b.name} of zeros has the shape {list(b.shape)}, expected numbers")

    def check_steps(steps: tuple[Step, ...]) -> None:
        for s in steps:
            if s.kind not in STEP_KINDS:
                raise FormatError(f"program.json: step {s.node} is of kind {s.kind!r}; known: {', '.join(STEP_KINDS)}")
            ids = [*buffers_in(s.args), *buffers_in(list(s.kwargs.values())), *s.dies]
            check_ids([*ids, *(o for o in s.outputs if o is not None)], s.node)
            for _, inner in s.variants:
                check_steps(inner)

    def check_ids(ids: list[int] | tuple[int, ...], where: str) -> None:
        for i in ids:
            if type(i) is not int or not 0 <= i < count:
                raise FormatError(f"program.json: {where} names buffer {i!r}; there are {count}")

    check_ids(program.inputs, "inputs")
    check_ids(program.outputs, "outputs")
    check_steps(program.steps)
    check_steps(program.views)
