"""What all stages of lifting share: the block's float64 copy, its runs and traces, and searches for values in these."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moec.compiler.capture.lifting.calls import Call, leaves, main_index
from moec.compiler.capture.lifting.held import tensors, widened
from moec.compiler.capture.lifting.program import NotGeneral, Program, generalise, program_of
from moec.compiler.capture.lifting.refused import Refused
from moec.compiler.capture.lifting.trace import ROWS, IdealArithmetic, Recorder, Value
from moec.passes.infra.errors import in_one_line

TOLERANCE = 1e-9
"""Relative, in float64: 1e6 times the rounding of a sum of a few thousand products, far below any real difference."""
SPANS = (((0, 5), (5, 10), (10, 17)), ((0, 1), (1, 2), (2, 3)))
"""Probe rows of the three traces that a program is generalised from; the second set works row by row."""
MAX_HITS = 12


@dataclasses.dataclass(frozen=True)
class Form:
    """How a value becomes [n, width]: as it lies, or turned; None: it stays as it is.

    each: the value is one vector [width], the same for all rows.  factor: multiplies the value.
    """

    width: int | None
    turned: bool = False
    each: bool = False
    factor: float = 1.0

    def __call__(self, value: Tensor, num_rows: int) -> Tensor | None:
        if self.factor != 1.0:
            value = value * self.factor
        if self.width is None:
            return value
        if self.each:
            return value.reshape(1, self.width).expand(num_rows, self.width)
        if value.numel() != num_rows * self.width:
            return None
        return value.reshape(self.width, num_rows).T if self.turned else value.reshape(num_rows, self.width)


Match = Callable[[Tensor], Form | None]
MatchFor = Callable[[int, int], Match]


@dataclasses.dataclass(frozen=True)
class Found:
    """A value of the trace as a program. form: brings its result into the asked shape.  rowwise: one row at a time."""

    program: Program
    form: Form
    rowwise: bool


class Study:
    """One block under study, by its float64 copy `wide` (made here if not given).

    probe: [P, H] rows that all stages look at; y: the block's outputs for them. expert_leaves: names of the tensors
    that belong to single experts (empty until the partition is known).
    """

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        seed: int = 0,
        wide: nn.Module | None = None,
    ) -> None:
        self.module, self.call = module, Call(args, kwargs)
        self.hidden = self.call.hidden
        self.wide = widened(module) if wide is None else wide
        self.leaves = tensors(self.wide)
        self.generator = torch.Generator().manual_seed(seed)
        self.seed, self.runs, self.notes = seed, 0, list[str]()
        self.expert_leaves: frozenset[str] = frozenset()
        self._traces: dict[tuple[int, int], Recorder] = {}
        self.probe = self.y = torch.empty(0)

    def rows(self, count: int, scale: float = 1.0) -> Tensor:
        """Fresh rows f64[count, H] from the study's own seed. scale: their standard deviation."""
        return torch.randn(count, self.hidden, generator=self.generator, dtype=torch.float64) * scale

    def output(self, rows: Tensor, lead: tuple[int, ...] | None = None, mask: Tensor | None = None) -> Any:
        """Everything that the float64 copy returns for rows [T, H]."""
        args, kwargs = self.call.split(self.call.bind(rows, lead, mask))
        self.runs += 1
        with torch.no_grad(), IdealArithmetic():
            return self.wide(*args, **kwargs)

    def run(self, rows: Tensor, lead: tuple[int, ...] | None = None, mask: Tensor | None = None) -> Tensor:
        """The copy's main output as [T, H]."""
        out = self.output(rows, lead, mask)
        return leaves(out)[main_index(out, len(rows), self.hidden)].reshape(len(rows), self.hidden).clone()

    def native(self, rows: Tensor) -> Tensor:
        """The block itself, in its own dtype, on a copy of its state: rows [T, H] -> [T, H]."""
        args, kwargs = self.call.split(self.call.bind(rows))
        with torch.no_grad():
            out = self.module(*args, **kwargs)
        return leaves(out)[main_index(out, len(rows), self.hidden)].reshape(len(rows), self.hidden)

    def trace(self, rows: Tensor) -> Recorder:
        """A recording of one call; its `output` is all that was returned."""
        bound = self.call.bind(rows)
        inputs = {ROWS: bound[self.call.key]} | {f"in:{k}": bound[k] for k in self.call.extras}
        recorder = Recorder(self.leaves, inputs)
        args, kwargs = self.call.split(bound)
        with torch.no_grad(), recorder:
            recorder.output = copy.copy(self.wide(*args, **kwargs))
        self.runs += 1
        return recorder

    def span(self, low: int, high: int) -> Recorder:
        """The trace of probe rows low..high, kept."""
        if (low, high) not in self._traces:
            self._traces[low, high] = self.trace(self.probe[low:high])
        return self._traces[low, high]

    def set_probe(self, probe: Tensor) -> None:
        """Runs the block on other rows, which all stages look at from now on; traces of the old ones are forgotten."""
        self.probe, self.y, self._traces = probe, self.run(probe), {}

    def search(self, recorder: Recorder, match: Match, any_source: bool = False) -> list[tuple[Value, Form]]:
        """Values that match and, without any_source, were not made from experts."""
        hits = []
        for value in recorder.values:
            if any_source or not value.taint & self.expert_leaves:
                form = match(value.tensor)
                if form is not None:
                    hits.append((value, form))
        return hits[:MAX_HITS]

    def replay(self, found: Found, rows: Tensor) -> Tensor:
        """A found program in float64 on rows [T, H]."""
        bind = self.call.bind

        def one(x: Tensor) -> Tensor:
            bound = bind(x)
            inputs = {ROWS: bound[self.call.key]} | {f"in:{k}": bound[k] for k in self.call.extras}
            with IdealArithmetic():
                return found.program.run(lambda n, t: inputs[n].clone() if n in inputs else t, len(x), torch.float64)

        def formed(x: Tensor) -> Tensor:
            shaped = found.form(one(x), len(x))
            if shaped is None:
                raise NotGeneral("the slice gives another shape on other rows")
            return shaped

        return torch.cat([formed(r[None]) for r in rows]) if found.rowwise and len(rows) else formed(rows)

    def general(
        self, match_for: MatchFor, what: str, any_source: bool = False, formed: MatchFor | None = None
    ) -> Found:
        """A program for the value that match_for(low, high) accepts on those probe rows; checked on all of them.

        formed: accepts the value once it has its form, where that changes it.
        Raises: NotGeneral: no value matches, or none as a program that holds for other rows.
        """
        why = f"no value of the trace is the {what}"
        for spans in SPANS:
            hits = [
                [
                    (program_of(self.span(*s), v.slot, v.time), form)
                    for v, form in self.search(self.span(*s), match_for(*s), any_source)
                ]
                for s in spans
            ]
            counts = [high - low for low, high in spans]
            for first, form in hits[0]:  # few rows: an earlier value may match by chance, so all are tried
                twins = [_twin(first, others) for others in hits[1:]]
                if twins[0] is None or twins[1] is None:
                    why = "the operations differ between two runs" if hits[1] and hits[2] else why
                    continue
                try:
                    program = generalise(first, twins[0], twins[1], counts[0], counts[2])
                    found = self._checked(Found(program, form, counts[2] == 1), formed or match_for)
                except NotGeneral as error:
                    why = str(error)
                    continue
                return found
        raise NotGeneral(why)

    def _checked(self, found: Found, match_for: MatchFor) -> Found:
        if found.program.writes_leaf:
            raise NotGeneral("the slice writes to a tensor of the module")
        try:
            holds = match_for(0, len(self.probe))(self.replay(found, self.probe)) is not None
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            raise NotGeneral(f"the slice fails on other rows ({type(error).__name__}): it follows the host") from error
        if not holds:
            raise NotGeneral("the slice does not give the same value on other rows: it follows the host")
        return found

    def values(self, recorder: Recorder, numel: int, last: int | None = None) -> list[Tensor]:
        """Distinct float values of that size (and last axis) that depend on the rows and on no expert."""
        kept: list[Tensor] = []
        for v in recorder.values:
            t = v.tensor
            if not t.is_floating_point() or t.numel() != numel or (last is not None and t.shape[-1] != last):
                continue
            if ROWS in v.taint and not v.taint & self.expert_leaves and not any(_same(t, k) for k in kept):
                kept.append(t)
        return kept


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def _twin(program: Program, others: list[tuple[Program, Form]]) -> Program | None:
    signature = program.signature()
    return next((p for p, _ in others if p.signature() == signature), None)


def close(a: Tensor, b: Tensor, scale: Tensor | float, tolerance: float = TOLERANCE) -> bool:
    """Whether all |a - b| are within tolerance * scale; NaN is not."""
    return bool(((a - b).abs() <= tolerance * scale).all())


def run_or_refuse(study: Study, rows: Tensor) -> Tensor:
    """A first run. Raises: Refused("run"): the block fails on ordinary rows, or gives values that are not finite."""
    try:
        y = study.run(rows)
    except Refused:
        raise
    except Exception as error:  # whatever the block's own code raises
        raise Refused("run", f"the block fails on probe rows: {in_one_line(error)}") from error
    if not torch.isfinite(y).all():
        raise Refused("run", "the output is not finite on ordinary rows")
    return y
