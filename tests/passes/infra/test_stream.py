"""Runs that share experts: each expert is made once for all, one at a time, and a run that fails fails alone."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_block import experts_op, softmax_route
from passing import Case, function_case
from torch import Tensor

from moec.passes.group_expert_gemms import GroupExpertGemms
from moec.passes.infra.stream import ExpertStack, Run, complete
from moec.passes.ir.evaluate import run_nodes, steps
from moec.passes.ir.weights import Weight, source, weights_of

pytestmark = pytest.mark.null
EXPERTS, HIDDEN, INNER, TOKENS = 8, 32, 64, 9


def block() -> Case:
    """A softmax gate and experts; moec::experts reads both stacks."""
    g = torch.Generator().manual_seed(0)
    shapes = {"router": (EXPERTS, HIDDEN), "w_in": (EXPERTS, 2 * INNER, HIDDEN), "w_out": (EXPERTS, HIDDEN, INNER)}
    parameters = {n: torch.randn(shape, generator=g) / shape[-1] ** 0.5 for n, shape in shapes.items()}
    return function_case(
        lambda m, x: experts_op(m, x, *softmax_route(m, x)), torch.randn(TOKENS, HIDDEN, generator=g), **parameters
    )


def grouped() -> Case:
    """The same with an op for each projection."""
    case = block()
    case.prepare(GroupExpertGemms())
    return case


class Maker:
    """Makes experts of a case's stacks and notes how often, and how many are there at a time."""

    def __init__(self, case: Case) -> None:
        self.count, self.most, self._alive = Counter[str](), 0, weakref.WeakSet[Tensor]()
        self.weights = {n: w.materialise(case.read) for n, w in weights_of(case.gm).items()}
        stacked = [n for n, w in self.weights.items() if w.dim() == 3]
        self.known = self.weights | {n: self._stack(n) for n in stacked}

    def _stack(self, name: str) -> Any:
        one = self.weights[name].shape[1:]
        return ExpertStack([source(f"{name}@{e}", one, torch.float32) for e in range(EXPERTS)], self._make)

    def _make(self, part: Weight) -> Tensor:
        name, _, expert = part.args[0].partition("@")
        made = self.weights[name][int(expert)].clone()
        self.count[part.args[0]] += 1
        self._alive.add(made)
        self.most = max(self.most, len(self._alive))
        return made


def whole(case: Case, weights: dict[str, Tensor]) -> Tensor:
    """The case's result, its stacks held whole."""
    nodes, given, output = pieces(case)
    return run_nodes(nodes, given, weights.__getitem__, {output})[output]


def pieces(case: Case) -> tuple[list[torch.fx.Node], dict[str, Tensor], str]:
    """The nodes between, the inputs by name, and the output's name."""
    graph = case.gm.graph
    inside = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    names = [n.name for n in graph.find_nodes(op="placeholder")]
    return inside, dict(zip(names, case.inputs, strict=True)), graph.output_node().all_input_nodes[0].name


def streamed(case: Case, maker: Maker) -> tuple[Run, str]:
    nodes, given, output = pieces(case)
    return Run(steps(nodes, given, maker.known.__getitem__, {output})), output


def test_means_what_whole_stacks_mean() -> None:
    for case in (block(), grouped()):
        maker = Maker(case)
        run, output = streamed(case, maker)
        complete([run])
        assert run.values is not None
        assert torch.equal(run.values[output], whole(case, maker.weights))
        assert set(maker.count.values()) == {1}


def test_runs_share_what_they_wait_for() -> None:
    """However many runs: an op over both stacks has one expert of each, ops over one stack one expert of that."""
    for case, most in ((block(), 2), (grouped(), 1)):
        maker = Maker(case)
        runs = [streamed(case, maker)[0] for _ in range(3)]
        complete(runs)
        assert all(run.values is not None for run in runs)
        assert set(maker.count.values()) == {1} and maker.most == most


def test_ops_over_one_stack_join_an_op_over_both() -> None:
    joint, apart = block(), grouped()
    maker = Maker(joint)
    runs = [streamed(case, maker)[0] for case in (joint, apart)]
    complete(runs)
    assert all(run.values is not None for run in runs)
    times = {name: {n for part, n in maker.count.items() if part.startswith(name)} for name in ("w_in", "w_out")}
    assert times == {"w_in": {1}, "w_out": {2}}  # the second op starts when the first has all its experts


def test_a_run_that_fails_fails_alone_and_names_the_node() -> None:
    case = block()
    maker = Maker(case)
    good, output = streamed(case, maker)
    nodes, given, _ = pieces(case)
    broken = dict(maker.known, w_out=maker.weights["w_out"][:, :, 1:])  # the wrong width, whole
    bad = Run(steps(nodes, given, broken.__getitem__, {output}))
    complete([bad, good])
    assert good.error is None and good.values is not None and bad.values is None
    assert isinstance(bad.error, RuntimeError)
    assert any("while evaluating experts" in note for note in bad.error.__notes__)


def test_a_weight_that_cannot_be_made_fails_every_run_that_needs_it() -> None:
    case = block()
    maker = Maker(case)
    maker.weights["w_in"] = torch.empty(0, 2 * INNER, HIDDEN)
    runs = [streamed(case, maker)[0] for _ in range(2)]
    complete(runs)
    assert all(isinstance(run.error, IndexError) for run in runs)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_evidence_holds_less_than_half_a_layer() -> None:
    """One expert in bf16, its codes and copies of it are 3/8 of a layer of eight; one whole stack would be 2/3."""
    script = Path(__file__).parents[2] / "support" / "evidence_memory.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    evaluated, layers = done.stdout.split()
    assert int(evaluated) == 10  # two regions, five probes
    assert float(layers) < 0.5
