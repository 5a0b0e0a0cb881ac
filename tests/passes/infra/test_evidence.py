"""Evidence: wrong passes are caught and named by pass, layer and site; right ones leave records."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable

import pytest
import torch
from gate_spellings import mixtral
from moe_block import gate_case
from passing import Case, experts_apart, family_case
from torch.fx import GraphModule, Node

from moec.passes.fuse_gate import FuseGate
from moec.passes.group_expert_gemms import GroupExpertGemms
from moec.passes.infra.base import Ledger, PassContext, PassResult
from moec.passes.infra.errors import PassError
from moec.passes.infra.evidence import gather
from moec.passes.infra.rewrite import call, remove_dead, replace
from moec.passes.infra.runner import run_passes
from moec.passes.infra.snapshot import take
from moec.passes.ir.experts_call import ExpertsCall
from moec.passes.ir.gate import GateSpec
from moec.passes.ir.weights import concat, slice_, weight_node, weights_of
from moec.passes.lift_gate import LiftGate

aten, moec = torch.ops.aten, torch.ops.moec
LAYER = 2


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A pass that breaks one layer and claims a success."""

    name: str
    spoil: Callable[[GraphModule, Node], None]
    target: torch._ops.OpOverload
    layer: int | None = LAYER

    def run(self, gm: GraphModule, context: PassContext) -> PassResult:
        for node in gm.graph.find_nodes(op="call_function", target=self.target):
            if node.meta.get("layer") == self.layer:
                self.spoil(gm, node)
        return PassResult(gm, True, Ledger())


def _new_experts(gm: GraphModule, node: Node, **changes) -> None:
    with gm.graph.inserting_before(node):
        made = {k: v(gm, node) if callable(v) else v for k, v in changes.items()}
        args = dataclasses.replace(ExpertsCall.of(node), **made).args
        replace(node, call(gm.graph, moec.experts.default, args, like=node))


def _swapped_halves(gm: GraphModule, node: Node) -> Node:
    w = weights_of(gm)[str(ExpertsCall.of(node).w_gate_up.target)]
    half = w.shape[1] // 2
    return weight_node(gm, "swapped", concat([slice_(w, 1, half, 2 * half), slice_(w, 1, 0, half)], 1))


def _rolled(gm: GraphModule, node: Node) -> Node:
    w = weights_of(gm)[str(ExpertsCall.of(node).w_down.target)]
    return weight_node(gm, "rolled", concat([slice_(w, 0, 1, w.shape[0]), slice_(w, 0, 0, 1)], 0))


def _next_expert(gm: GraphModule, node: Node) -> Node:
    site = ExpertsCall.of(node)
    later = call(gm.graph, aten.add.Tensor, (site.experts, 1), like=node)
    return call(gm.graph, aten.remainder.Scalar, (later, site.num_routed), like=node)


def _reversed_weights(gm: GraphModule, node: Node) -> Node:
    return call(gm.graph, aten.flip.default, (ExpertsCall.of(node).weights, [1]), like=node)


def _spec(**changes) -> Callable[[GraphModule, Node], None]:
    def spoil(gm: GraphModule, node: Node) -> None:
        spec = dataclasses.replace(GateSpec.decode(node.args[2]), **changes)
        with gm.graph.inserting_before(node):
            new = call(gm.graph, moec.gate.default, (*node.args[:2], spec.encode()), like=node)
            items = [call(gm.graph, operator.getitem, (new, u.args[1]), like=node) for u in list(node.users)]
        for old, item in zip(list(node.users), items, strict=True):
            replace(old, item)
        remove_dead(gm)

    return spoil


def _no_bias(gm: GraphModule, node: Node) -> None:
    spec = dataclasses.replace(GateSpec.decode(node.args[2]), bias_on="none")
    with gm.graph.inserting_before(node):
        new = call(gm.graph, moec.gate.default, (node.args[0], None, spec.encode()), like=node)
    node.meta.pop("layer")
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


EXPERTS, GATE = moec.experts.default, moec.gate.default
WRONG = {
    "swapped gate and up": (EXPERTS, lambda gm, n: _new_experts(gm, n, w_gate_up=_swapped_halves)),
    "experts rolled by one": (EXPERTS, lambda gm, n: _new_experts(gm, n, w_down=_rolled)),
    "off-by-one expert": (EXPERTS, lambda gm, n: _new_experts(gm, n, experts=_next_expert)),
    "weights of other experts": (EXPERTS, lambda gm, n: _new_experts(gm, n, weights=_reversed_weights)),
    "another activation": (EXPERTS, lambda gm, n: _new_experts(gm, n, act="gelu")),
    "weight on the input": (EXPERTS, lambda gm, n: _new_experts(gm, n, weight_on_input=True)),
    "dropped renormalisation": (GATE, _spec(renormalise=False)),
    "dropped scale": (GATE, _spec(scale=1.0)),
    "dropped selection bias": (GATE, _no_bias),
    "other groups": (GATE, _spec(groups_kept=2)),
    "best instead of the two best of a group": (GATE, _spec(group_score="max")),
    "softmax for sigmoid": (GATE, _spec(score="softmax")),
}


def _deepseek() -> Case:
    case = family_case("deepseek_v3")
    case.apply(LiftGate())
    return case


@pytest.mark.null
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize(("mode", "stored"), [("sampled", "stacks"), ("full", "stacks"), ("sampled", "experts")])
def test_wrong_passes_are_caught_and_named(name: str, mode: str, stored: str) -> None:
    """stored: what the checkpoint has a tensor for. Experts are evaluated one by one, stacks as a whole."""
    target, spoil = WRONG[name]
    case = _deepseek() if stored == "stacks" else experts_apart(_deepseek())
    with pytest.raises(PassError, match=rf"pass fuse-wrongly: layer {LAYER}, \w+: probe '.*': .* differs by"):
        context = PassContext(read=case.read)
        run_passes(case.gm, [Wrong("fuse-wrongly", spoil, target)], context, evidence=mode)


@pytest.mark.null
def test_wrong_k_is_caught_and_named() -> None:
    """Another K is another shape: the value cannot take over the name."""
    case = _deepseek()
    wrong = Wrong("fuse-wrongly", _spec(top_k=1), GATE)
    with pytest.raises(PassError, match=r"pass fuse-wrongly: .*expected shape \[s\d+, 2\], got \[s\d+, 1\]"):
        run_passes(case.gm, [wrong], PassContext(read=case.read), evidence="full")


def _top_1_twice(gm: GraphModule, node: Node) -> None:
    """Wrong k behind the right shape: the best expert takes both places, with both weights."""
    with gm.graph.inserting_before(node):
        experts = ExpertsCall.of(node).experts
        first = call(gm.graph, aten.slice.Tensor, (experts, 1, 0, 1), like=node)
        twice = call(gm.graph, aten.expand_as.default, (first, experts), like=node)
    _new_experts(gm, node, experts=twice)


@pytest.mark.null
def test_wrong_k_behind_the_right_shape_is_caught() -> None:
    case = _deepseek()
    with pytest.raises(PassError, match=f"pass fuse-wrongly: layer {LAYER}"):
        wrong = Wrong("fuse-wrongly", _top_1_twice, EXPERTS)
        run_passes(case.gm, [wrong], PassContext(read=case.read), evidence="full")


@pytest.mark.null
def test_records_say_what_was_compared() -> None:
    case = family_case("mixtral")
    passes = [LiftGate(), FuseGate(), GroupExpertGemms()]
    sampled = run_passes(case.gm, passes, PassContext(read=case.read), evidence="sampled").evidence
    assert {e.pass_name for e in sampled} == {p.name for p in passes}
    for one in passes:
        mine = [e for e in sampled if e.pass_name == one.name]
        assert [e.probe for e in mine] == ["random", "scales", "one-routing", "T=1", "T=0"]
        assert all(e.regions == 3 and e.layer == 0 and e.weights == "checkpoint" for e in mine)
        assert all(e.max_rel_err is not None and e.max_rel_err <= e.tolerance for e in mine)
    case = family_case("mixtral")
    full = run_passes(case.gm, passes, PassContext(read=case.read), evidence="full").evidence
    assert len(full) == 3 * len(sampled) and {e.layer for e in full} == {0, 1, 2}


@pytest.mark.null
def test_no_evidence_where_nothing_changed() -> None:
    case = family_case("mixtral")
    assert gather("nothing", take(case.gm), take(case.gm), case.read, every=True) == []


@pytest.mark.null
def test_renamed_output_is_refused() -> None:
    case = gate_case(mixtral)
    before = take(case.gm)
    (node,) = case.gm.graph.find_nodes(op="call_function", target=EXPERTS)
    with case.gm.graph.inserting_before(node):
        new = call(case.gm.graph, EXPERTS, node.args, like=node)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    with pytest.raises(PassError, match="outputs were"):
        gather("rename", before, take(case.gm), case.read, every=True)


@pytest.mark.null
def test_random_weights_stand_in_and_are_named() -> None:
    case = gate_case(mixtral)
    records = run_passes(case.gm, [LiftGate()], PassContext(), evidence="full").evidence
    assert {e.weights for e in records} == {"random"} and all(e.max_rel_err is not None for e in records)
