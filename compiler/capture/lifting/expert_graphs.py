"""Experts of a form that no layout has: one cut from the traces of single rows, the same operations for all experts."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from moec.compiler.capture.lifting.layouts import ratio
from moec.compiler.capture.lifting.partition import Partition
from moec.compiler.capture.lifting.program import Leaf, NotGeneral, Program, ProgramStep, generalise, program_of
from moec.compiler.capture.lifting.refused import Refused
from moec.compiler.capture.lifting.study import TOLERANCE, Study
from moec.compiler.capture.lifting.trace import ROWS, Recorder, Slot
from moec.compiler.capture.tensors import storage_of

ROWS_PER_EXPERT = 3
GATHERS = ("index", "index_select", "gather", "masked_select", "take", "embedding")


@dataclasses.dataclass(frozen=True)
class GraphExperts:
    """Experts as one program on one row.

    program: expert `first`'s.  leaf_names: name of each of its leaves, for each expert.  by_expert: literals that
    follow the expert's number, as (step, argument) -> (a, b) of a * e + b.  weights: as KnownExperts.
    many: the program's forms for many rows, by expert and dtype, once they were made.
    """

    program: Program
    leaf_names: tuple[tuple[str, ...], ...]
    by_expert: dict[tuple[int, int], tuple[int, int]]
    weights: Tensor
    many: dict[Any, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def of(self, expert: int) -> Program:
        """The program of one expert; its leaves by that expert's names."""
        steps = list(self.program.steps)
        for (i, k), (a, b) in self.by_expert.items():
            flat: list[Any] = list(steps[i].flat)
            flat[k] = a * expert + b
            steps[i] = ProgramStep(steps[i].func, tuple(flat), steps[i].spec, steps[i].outputs)
        return dataclasses.replace(self.program, steps=steps, leaf_names=list(self.leaf_names[expert]))


def find_expert_graphs(study: Study, partition: Partition, each: Tensor) -> GraphExperts:
    """each: f64[P, E, L], what each expert adds.

    Raises: Refused("expert"): no value is proportional to a contribution, or the experts differ.
    """
    chosen = partition.chosen
    programs: dict[int, Program] = {}
    for e in range(partition.num_experts):
        for t in chosen[:, e].nonzero()[:ROWS_PER_EXPERT, 0].tolist():
            program = _cut(study, partition, e, t, each[t, e])
            if e not in programs:
                programs[e] = program
                continue
            try:
                generalise(programs[e], program, program, 1, 2)
            except NotGeneral as error:
                raise Refused("expert", f"expert {e}: {error}") from error
    if len(programs) < partition.num_experts:
        missing = sorted(set(range(partition.num_experts)) - set(programs))
        raise Refused("expert", f"no probe row reaches expert {missing[0]}, and its form has to be read from a trace")
    names = tuple(_names(study, partition, programs[0], e) for e in range(partition.num_experts))
    found = GraphExperts(programs[0], names, _compare(study, partition, programs, names), torch.empty(0))
    return dataclasses.replace(found, weights=_weights(study, partition, each, found))


def _cut(study: Study, partition: Partition, e: int, t: int, delta: Tensor) -> Program:
    """The program of the value that is proportional to expert e's contribution to row t."""
    recorder = _without_gathers(study.span(t, t + 1))
    mine = _storage_names(study, partition, e)
    row = study.probe[t]
    cut = {}
    for v in recorder.values:
        plain = v.tensor.numel() == study.hidden and v.tensor.is_floating_point() and not v.taint & mine
        if plain and torch.equal(v.tensor.reshape(-1), row) and not v.taint - {ROWS}:
            cut[v.slot] = ROWS
    best = None
    gate = _gate_names(recorder, study) - mine
    for v in recorder.values:
        plain = v.tensor.numel() == len(delta) and v.tensor.is_floating_point()
        own = plain and bool(v.taint & mine) and not v.taint & gate
        if own and ratio(delta[None], v.tensor.reshape(1, -1))[1] < TOLERANCE:
            best = v
    if best is None:
        raise Refused("expert", "no known layout fits and no value of the trace is proportional to a contribution")
    return program_of(recorder, best.slot, best.time, cut)


def _without_gathers(recorder: Recorder) -> Recorder:
    """The trace of one row where gathering that row from itself is a reshape: it does not depend on the routing."""
    plain = copy.copy(recorder)
    plain.steps = list(recorder.steps)
    made = {v.slot: v.tensor for v in reversed(recorder.values)}
    for i, step in enumerate(recorder.steps):
        tensors = [a for a in step.flat if isinstance(a, Slot)]
        if step.name not in GATHERS or not tensors or not step.outputs:
            continue
        source, result = made.get(tensors[0].index), made.get(step.outputs[0])
        if source is None or result is None or source.numel() != result.numel():
            continue
        if torch.equal(source.reshape(-1), result.reshape(-1)):
            flat, spec = tree_flatten(((tensors[0], list(result.shape)), {}))
            plain.steps[i] = dataclasses.replace(step, func=torch.ops.aten.reshape.default, flat=tuple(flat), spec=spec)
    return plain


def _gate_names(recorder: Recorder, study: Study) -> set[str]:
    return {n for _, taint in recorder.selections if ROWS in taint for n in taint if n in study.leaves}


def _storage_names(study: Study, partition: Partition, e: int) -> set[str]:
    """Leaves that share memory with expert e's tensors."""
    storages = {storage_of(g.view(study.leaves, e)) for g in partition.groups}
    return {n for n, t in study.leaves.items() if storage_of(t) in storages}


def _names(study: Study, partition: Partition, program: Program, e: int) -> tuple[str, ...]:
    """The program's leaves as expert e has them: those of lists of tensors change with the expert."""
    swap = {g.names[g.kept[0]]: g.names[g.kept[e]] for g in partition.groups if g.kind == "list"}
    return tuple(swap.get(n, n) for n in program.leaf_names)


def _compare(
    study: Study, partition: Partition, programs: dict[int, Program], names: tuple[tuple[str, ...], ...]
) -> dict[tuple[int, int], tuple[int, int]]:
    """Requires the same operations of all experts; integers may follow the expert's number."""
    first = programs[0]
    for e, program in programs.items():
        if program.signature() != first.signature() or tuple(program.leaf_names) != names[e]:
            raise Refused("expert", f"expert {e} computes something else than expert 0")
    following: dict[tuple[int, int], tuple[int, int]] = {}
    for i, step in enumerate(first.steps):
        for k, literal in enumerate(step.flat):
            values = [programs[e].steps[i].flat[k] for e in range(len(programs))]
            if isinstance(literal, bool) or not isinstance(literal, int | float) or len(set(values)) <= 1:
                continue
            if isinstance(literal, float):
                raise Refused("expert", "the experts use different constants")
            slope = values[1] - values[0]
            if any(v != slope * e + values[0] for e, v in enumerate(values)):
                raise Refused("expert", "a literal differs between experts without following their number")
            following[i, k] = (slope, values[0])
    return following


def _weights(study: Study, partition: Partition, each: Tensor, experts: GraphExperts) -> Tensor:
    weights = torch.zeros(len(study.probe), partition.num_experts, dtype=torch.float64)
    for e in range(partition.num_experts):
        program = experts.of(e)
        for t in partition.chosen[:, e].nonzero()[:, 0].tolist():
            unit = program.run(row_leaf(study.leaves, study.probe[t : t + 1]), 1, torch.float64).reshape(1, -1)
            w, rest = ratio(each[t, e][None], unit)
            if not rest < TOLERANCE:
                raise Refused("expert", f"the program cut out for an expert does not hold for expert {e}")
            weights[t, e] = w
    return weights


def row_leaf(leaves: dict[str, Tensor], row: Tensor) -> Leaf:
    """Leaves for one row [1, H], whatever shape the trace had it in."""

    def leaf(name: str, traced: Tensor) -> Tensor:
        return row.reshape(traced.shape).clone() if name == ROWS else leaves.get(name, traced)

    return leaf
