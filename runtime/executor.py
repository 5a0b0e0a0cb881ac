"""Turns a program into one Python function: a line per step, everything else resolved before the first call."""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from moec.runtime.batch import Batch
from moec.runtime.errors import DeviceMemoryError, EngineError, InputError, StepError
from moec.runtime.expressions import evaluate
from moec.runtime.memory import Frames
from moec.runtime.program import Program, Step
from moec.runtime.source import ON_CPU, Place, ProgramSource
from moec.runtime.timeline import Recorder

FILE_NAME = "<moec program>"


class Executor:
    """A program with its weights and kernels, ready to run.

    Args: weights: by buffer name.  kernels: symbol -> function of tensors and numbers; where steps name arguments, an
        object whose ordered(names) is that function.
        to_kernel: makes of a torch tensor what kernels take at least cost; done once for weights and arena buffers.
        collective: the function of a collective step; None for an engine of one rank.
    Raises: FormatError: the program asks for what this runtime does not have.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Tensor],
        kernels: Mapping[str, Callable[..., Any]],
        to_kernel: Callable[[Tensor], Any] = lambda tensor: tensor,
        collective: Callable[[Step], Callable[..., Any]] | None = None,
        place: Place = ON_CPU,
    ) -> None:
        self.program, self._collective, self.place = program, collective, place
        self._weights = {b.name: weights.get(b.name) for b in program.buffers if b.kind == "weight"}
        self._kernels, self._to_kernel = kernels, to_kernel
        self._steps: list[Step] = []  # the step of each source line, header lines left out
        self.frames: Frames
        self.recorder: Recorder | None = None
        self._sources: list[ProgramSource] = []
        self._run = self._compile(timed=False)
        self._timed: Callable[..., Any] | None = None

    @classmethod
    def like(cls, other: Executor, program: Program) -> Self:
        """Of another program on the weights, kernels and device of an executor. Raises: FormatError."""
        weights = {name: tensor for name, tensor in other._weights.items() if tensor is not None}
        return cls(program, weights, other._kernels, other._to_kernel, other._collective, other.place)

    def __call__(self, inputs: Sequence[Tensor], batch: Batch | None = None) -> list[Tensor]:
        """Runs all steps. inputs: in the program's order; caches among them are written. batch: where the program asks.

        Raises: StepError naming the step and its node.
        """
        with torch.inference_mode():
            return self._checked(inputs, batch)

    def ordinary(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """As a call, but gives tensors that code outside of inference mode may change in place. Raises: StepError."""
        with torch.inference_mode(False), torch.no_grad():
            return self._checked(inputs, None)

    def _checked(self, inputs: Sequence[Tensor], batch: Batch | None) -> list[Tensor]:
        try:
            return self._run(inputs, batch) if self.recorder is None else self._recorded(inputs, batch)
        except EngineError:
            raise
        except torch.OutOfMemoryError as error:
            message = self._out_of_memory(error, inputs)
            traceback.clear_frames(error.__traceback__)  # whose variables hold the step's tensors
        except Exception as error:
            raise self._step_error(error) from error
        raise DeviceMemoryError(message)

    def _out_of_memory(self, error: Exception, inputs: Sequence[Tensor]) -> str:
        """Which step asked for too much, with which sizes, and what there is."""
        p, sizes = self.program, dict[str, int]()
        for i, x in zip(p.inputs, inputs, strict=False):
            sizes |= {d: n for d, n in zip(p.buffers[i].shape, x.shape, strict=False) if d in p.symbols}  # type: ignore[misc]
        with_sizes = ", ".join(f"{name}={n}" for name, n in sorted(sizes.items()))
        arena = evaluate(p.arena_bytes, sizes) / 2**20
        return (
            f"{self._where(error)}: out of memory with {with_sizes}: the arena takes {arena:.1f} MiB, "
            f"{self.place.memory()}; feed fewer tokens at a time, or make a smaller cache"
        )

    def _recorded(self, inputs: Sequence[Tensor], batch: Batch | None) -> list[Tensor]:
        """As a plain run, with each step noted by the recorder."""
        marks: list[tuple[int, float]] = []
        outputs = self._timed_run()(inputs, batch, lambda i: marks.append((i, time.perf_counter())))
        if self.recorder is not None:
            self.recorder.steps(self._steps, marks)
        return outputs

    def _timed_run(self) -> Callable[..., Any]:
        if self._timed is None:
            self._timed = self._compile(timed=True)
        return self._timed

    def counters(self) -> list[dict[str, Any]]:
        """What the steps that count have counted (launch/limit.py). Plain and timed runs count apart; both are here."""
        return [f.counters() for source in self._sources for f in source.counting]

    def set_weight(self, name: str, tensor: Tensor) -> bool:
        """Lets a weight be another tensor from the next run on -> whether the program has such a weight.

        Raises: InputError: it has another shape or dtype.
        """
        if name in self._weights:
            self._weights[name] = tensor
        return sum(source.set_weight(name, tensor) for source in self._sources) > 0

    def profile(self, inputs: Sequence[Tensor], batch: Batch | None = None) -> list[tuple[Step, float]]:
        """Runs once -> each step that ran and its wall time in microseconds (a timer call included, about 0.1)."""
        marks: list[tuple[int, float]] = []

        def clock(step: int) -> None:
            self.place.synchronise()
            marks.append((step, time.perf_counter()))

        with torch.inference_mode():
            self._timed_run()(inputs, batch, clock)
        steps = self._steps
        return [(steps[i], (t - before) * 1e6) for (_, before), (i, t) in itertools.pairwise(marks)]

    def check_inputs(self, inputs: Sequence[Tensor]) -> None:
        """Raises InputError where an input's number, type, rank or a fixed dimension is not the program's."""
        wanted = [self.program.buffers[i] for i in self.program.inputs]
        if len(inputs) != len(wanted):
            raise InputError(
                f"the engine takes {len(wanted)} inputs ({', '.join(b.name for b in wanted)}), got {len(inputs)}"
            )
        sizes: dict[str, int] = {}
        for buffer, x in zip(wanted, inputs, strict=True):
            shape = [sizes.get(d, d) if isinstance(d, str) else d for d in buffer.shape]
            expected = f"{buffer.dtype}{list(buffer.shape)}".replace("'", "")
            got = f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
            fits = x.dim() == len(shape) and str(x.dtype) == f"torch.{buffer.dtype}"
            if not fits or any(isinstance(d, int) and d != n for d, n in zip(shape, x.shape, strict=True)):
                raise InputError(f"input {buffer.name}: expected {expected}, got {got}")
            sizes.update({d: n for d, n in zip(shape, x.shape, strict=True) if isinstance(d, str)})

    def _compile(self, timed: bool) -> Callable[..., Any]:
        collective = self._followed if timed and self._collective is not None else self._collective
        source = ProgramSource(
            self.program, self._weights, self._kernels, self._to_kernel, timed, collective, self.place
        )
        self._sources.append(source)
        namespace = source.namespace
        exec(compile(source.text, FILE_NAME, "exec"), namespace)
        if not timed:
            self._steps = source.steps
            device = self.place.device
            self.frames = Frames(self.program, source.arena_symbols, namespace["views"], self._to_kernel, device)
        namespace["frame"] = self.frames.at
        return namespace["run"]

    def _followed(self, step: Step) -> Callable[..., Any]:
        """A collective step's function that tells the recorder, if there is one then, when its operation is over."""
        assert self._collective is not None
        start = self._collective(step)
        if step.name == "wait_tensor":
            return start

        def run(*args: Any) -> Any:
            pending = start(*args)
            if self.recorder is not None:
                self.recorder.follow(pending.work, pending.where)
            return pending

        return run

    def _step_error(self, error: Exception) -> StepError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return StepError(f"{self._where(error)} failed: {reason}")

    def _where(self, error: Exception) -> str:
        """The step whose line of the run function raised."""
        line, trace = 0, error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == FILE_NAME:
                line = trace.tb_lineno
            trace = trace.tb_next
        index = line - self._sources[0 if self.recorder is None else -1].header_lines - 1
        if not 0 <= index < len(self._steps):
            return "the program, before its first step,"
        step = self._steps[index]
        return f"step {index} ({step.kind} {step.name}, node {step.node})"
