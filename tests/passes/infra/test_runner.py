"""The runner: checks after every pass, ledgers by name, numbered dumps, errors that name the pass and those before."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gate_spellings import mixtral
from moe_block import gate_case
from torch.fx import GraphModule, Node

from moec.passes.fuse_gate import FuseGate
from moec.passes.infra.base import Ledger, Match, PassContext, PassResult
from moec.passes.infra.errors import PassError, in_one_line
from moec.passes.infra.runner import run_passes
from moec.passes.lift_gate import LiftGate

EXPERTS = torch.ops.moec.experts.default


@dataclasses.dataclass(frozen=True)
class Doing:
    """A pass of one function."""

    act: object
    changed: bool = True
    name: str = "do-something"

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        self.act(gm)
        return PassResult(gm, self.changed, Ledger((Match("n"),)))


def _run(act, changed: bool = True, **options):
    case = gate_case(mixtral)
    return run_passes(case.gm, [LiftGate(), Doing(act, changed)], PassContext(read=case.read), **options)


def _experts(gm: GraphModule) -> Node:
    (node,) = gm.graph.find_nodes(op="call_function", target=EXPERTS)
    return node


@pytest.mark.null
def test_ledgers_and_dumps() -> None:
    case, dumped = gate_case(mixtral), {}
    result = run_passes(case.gm, [LiftGate(), FuseGate()], PassContext(read=case.read), dump=dumped.__setitem__)
    assert list(result.ledgers) == ["lift-gate", "fuse-gate"] and result.evidence == ()
    assert list(dumped) == ["00-captured", "01-lift-gate", "02-fuse-gate"]
    assert "aten.topk" in dumped["00-captured"] and "moec.gate_linear" in dumped["02-fuse-gate"]


@pytest.mark.null
def test_a_pass_that_runs_twice_has_one_ledger() -> None:
    case = gate_case(mixtral)
    same = Doing(lambda gm: None, changed=False)
    ledgers = run_passes(case.gm, [same, same], PassContext()).ledgers
    assert len(ledgers["do-something"].matched) == 2


@pytest.mark.null
def test_an_exception_names_the_pass_and_those_before() -> None:
    def crash(gm: GraphModule) -> None:
        raise KeyError("w")

    with pytest.raises(PassError, match=r"pass do-something: KeyError: 'w' \(after lift-gate\)"):
        _run(crash)


@pytest.mark.null
def test_errors_of_several_lines_become_one() -> None:
    assert in_one_line(RuntimeError("expected a\n\n  but got b\n")) == "RuntimeError: expected a but got b"
    assert in_one_line(KeyError()) == "KeyError" and in_one_line(ValueError("x" * 300)) == f"ValueError: {'x' * 200}"


def _unordered(gm: GraphModule) -> None:
    node = _experts(gm)
    node.args[1].append(node)
    gm.graph.output_node().append(node.args[1])


def _without_value(gm: GraphModule) -> None:
    _experts(gm).meta.pop("val")


def _other_shape(gm: GraphModule) -> None:
    node = _experts(gm)
    node.meta["val"] = node.meta["val"][:, :3]


def _other_dtype(gm: GraphModule) -> None:
    node = _experts(gm)
    node.meta["val"] = node.meta["val"].to(torch.float64)


def _other_act(gm: GraphModule) -> None:
    node = _experts(gm)
    node.args = (*node.args[:8], "gelu")


@pytest.mark.null
@pytest.mark.parametrize(
    ("act", "changed", "message"),
    [
        (_unordered, True, "pass do-something left a malformed graph"),
        (_without_value, True, r"pass do-something: new node experts has no meta\['val'\]"),
        (_other_shape, True, r"pass do-something: layer None, experts: expected shape .* got \[.*3\]"),
        (_other_dtype, True, "pass do-something: layer None, experts: expected dtype torch.float32, got torch.float64"),
        (_other_act, False, "pass do-something says that it changed nothing, and did"),
    ],
)
def test_broken_graphs_are_named(act, changed: bool, message: str) -> None:
    with pytest.raises(PassError, match=message):
        _run(act, changed)


@pytest.mark.null
def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="known: off, sampled, full"):
        _run(lambda gm: None, evidence="sometimes")
