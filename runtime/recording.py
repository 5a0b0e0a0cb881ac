"""Lets an engine tell which experts its gates choose while it answers: `moec trace`.

    with record_routing(engine) as recorder:
        engine.generate(prompt)
    write_routing(recorder.routing(engine.manifest["model"]["model_type"]), "routing.json")

The program is run with a copy of each gate's result as a further output. Outside of the `with` the engine runs its own
program: an engine that is not recorded pays nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from moec.runtime.batch import Batch
from moec.runtime.engine import Engine
from moec.runtime.errors import FormatError, InputError
from moec.runtime.executor import Executor
from moec.runtime.program import Program, Step
from moec.runtime.routing import RoutingRecorder


class RecordingExecutor(Executor):
    """An executor of a program with added outputs, which go to `chosen` and not to the caller."""

    chosen: RoutingRecorder

    def __call__(self, inputs: Sequence[Tensor], batch: Batch | None = None) -> list[Tensor]:
        outputs = super().__call__(inputs, batch)
        layers = len(self.chosen.layers)
        for place, experts in enumerate(outputs[len(outputs) - layers :]):
            self.chosen.add(place, experts)
        return outputs[: len(outputs) - layers]


@contextmanager
def record_routing(engine: Engine) -> Iterator[RoutingRecorder]:
    """Records what runs inside of the `with`.

    Raises: InputError: an engine of several ranks, or a plain module.  FormatError: its gates cannot be told apart.
    """
    model = engine.manifest["model"]
    if engine.manifest["ranks"] > 1:
        raise InputError("routing is recorded on an engine of one rank: compile the model without --mesh and --devices")
    layers: list[int] = model.get("moe_layers", [])
    if not layers:
        raise InputError("the engine has no layer with experts: there is no routing to record")
    own = engine.executor
    recording = RecordingExecutor.like(own, _giving_experts(own.program, model["top_k"], len(layers)))
    recording.chosen = RoutingRecorder([(layer, model["experts"]) for layer in layers])
    engine.executor = recording
    try:
        yield recording.chosen
    finally:
        engine.executor = own


def _giving_experts(program: Program, top_k: int, num_layers: int) -> Program:
    """The program with a copy of each gate's experts i32[T, top_k] as a further output, in the order of layers.

    They are copied right after the gate's step, or after the layer's where that may do the gate's work (on a GPU):
    later steps may reuse their memory.
    """
    buffers, steps, copies = list(program.buffers), list[Step](), list[int]()
    last_maker = {made: at for at, step in enumerate(program.steps) for made in _made(step)}
    for at, step in enumerate(program.steps):
        steps.append(step)
        for made in sorted(m for m in _made(step) if last_maker[m] == at):
            found = program.buffers[made]
            if found.dtype == "int32" and found.shape[1:] == (top_k,) and isinstance(found.shape[0], str):
                copies.append(len(buffers))
                buffers.append(dataclasses.replace(found, name=f"routing_{made}", kind="value", offset=None))
                steps.append(Step("aten", "aten.clone.default", step.node, ({"buffer": made},), outputs=(copies[-1],)))
    if len(copies) != num_layers:
        raise FormatError(
            f"the engine has {num_layers} layers with experts and {len(copies)} values that look like their choice; "
            "its routing cannot be recorded"
        )
    return dataclasses.replace(program, buffers=tuple(buffers), steps=tuple(steps), outputs=(*program.outputs, *copies))


def _made(step: Step) -> set[int]:
    """The buffers that a step, or any of its variants, gives its results in."""
    inner = (made for _, steps in step.variants for s in steps for made in _made(s))
    return {o for o in step.outputs if o is not None} | set(inner)


def run_sequences(
    engine: Engine,
    sequences: Sequence[Sequence[int]],
    batch: int,
    max_new_tokens: int,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> None:
    """Feeds sequences `batch` at a time, and goes on with each for max_new_tokens (0: the prompts alone)."""
    for start in range(0, len(sequences), batch):
        part = [list(s) for s in sequences[start : start + batch]]
        if max_new_tokens:
            engine.generate(part, max_new_tokens, stop_tokens=())
        else:
            cache = engine.new_cache(len(part), max(map(len, part)))
            engine.step(cache, [cache.allocate() for _ in part], part)
        progress("sequences", min(start + batch, len(sequences)), len(sequences))


def read_tokens(path: Path) -> list[list[int]]:
    """A file of token ids: a sequence a line, as a JSON list or as numbers with commas or spaces between.

    Raises: InputError: it cannot be read, a line holds anything else, or there is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a file of token ids ({error})") from error
    found = [_tokens(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"{path}: there are no tokens; expected a line of token ids for each sequence")
    return found


def _tokens(line: str, where: str) -> list[int]:
    try:
        values: Any = json.loads(line) if line.strip().startswith("[") else line.replace(",", " ").split()
        return [_whole(value) for value in values]
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: expected token ids such as 17,4,256, got {line.strip()[:40]!r}") from error


def _whole(value: Any) -> int:
    if isinstance(value, bool | float):
        raise ValueError(f"{value} is no token id")
    return int(value)
