"""fuse-shared-experts: shared experts become segments of the stacks that every token uses."""

from __future__ import annotations

import pytest
import torch
from passing import Case, check_bad_input, check_runs_once, check_same, family_case, reasons
from zoo import build, tiny

from moec.compiler.capture.entry import capture
from moec.passes.drop_batch_axis import DropBatchAxis
from moec.passes.fold_views import FoldViews
from moec.passes.fuse_gate_up import FuseGateUp
from moec.passes.fuse_shared_experts import FuseSharedExperts
from moec.passes.infra.base import PassContext
from moec.passes.infra.errors import PassError
from moec.passes.ir.text import graph_text
from moec.passes.ir.weights import source

EXPERTS = torch.ops.moec.experts.default


def _prepared(case: Case) -> Case:
    case.prepare(DropBatchAxis(), FoldViews(), FuseGateUp())
    return case


def _qwen2_with_multiple() -> Case:
    """Qwen2-MoE with a gated shared expert of three times the expert width."""
    from passing import language_model_inputs

    captured = capture(build(tiny("qwen2_moe", shared_expert_intermediate_size=72, num_hidden_layers=2)))
    return _prepared(Case(captured.graph_module, captured.read, language_model_inputs(captured)))


@pytest.mark.null
@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "hunyuan_v1_moe"])
def test_fires_on_models(family: str) -> None:
    case = _prepared(family_case(family))
    before = case.value()
    ledger = case.apply(FuseSharedExperts())["fuse-shared-experts"]
    assert ledger.matched and not ledger.refused
    assert {m.detail for m in ledger.matched} == {"1 shared"}
    # the same products, summed in another order
    check_same(before, case.value(), 1e-5)


@pytest.mark.null
def test_a_weighted_shared_expert_of_three_segments(golden) -> None:
    case = _qwen2_with_multiple()
    before = case.value()
    ledger = case.apply(FuseSharedExperts())["fuse-shared-experts"]
    assert [m.detail for m in ledger.matched] == ["3 shared, weighted"] * 2
    check_same(before, case.value(), 1e-5)
    text = graph_text(case.gm)
    first = next(i for i, line in enumerate(text.splitlines()) if "moec.experts" in line)
    recipes = [line for line in text.splitlines() if "and_shared" in line and "=" in line.split("(")[0]]
    golden("weighted", "\n".join([text.splitlines()[first], *recipes[-2:]]) + "\n")


@pytest.mark.null
def test_leaves_alone_a_width_that_is_no_multiple() -> None:
    case = _prepared(family_case("qwen2_moe"))
    before = case.value()
    ledger = case.apply(FuseSharedExperts())["fuse-shared-experts"]
    assert not ledger.matched
    assert set(reasons(ledger)) == {"its width 40 is no multiple of the expert width 24"}
    check_same(before, case.value())


def _argument(place: int, change):
    def spoil(case: Case) -> None:
        for node in case.gm.graph.find_nodes(op="call_function", target=EXPERTS):
            node.update_arg(place, change(node.args[place] if place < len(node.args) else None))

    return spoil


def _other_input(case: Case) -> None:
    for node in case.gm.graph.find_nodes(op="call_function", target=torch.ops.moec.gated_mlp.default):
        with case.gm.graph.inserting_before(node):
            copy = case.gm.graph.call_function(torch.ops.aten.relu.default, (node.args[0],))
        copy.meta.update(node.args[0].meta)
        node.update_arg(0, copy)


def _computed_weight(case: Case) -> None:
    for node in case.gm.graph.find_nodes(op="call_function", target=EXPERTS):
        with case.gm.graph.inserting_before(node):
            copy = case.gm.graph.call_function(torch.ops.aten.neg.default, (node.args[4],))
        copy.meta.update(node.args[4].meta)
        node.update_arg(4, copy)


@pytest.mark.null
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_argument(8, lambda act: "gelu"), "its activation is silu, the routed experts have gelu"),
        (_other_input, "the routed experts read"),
        (_computed_weight, "a weight is computed in the graph"),
        (_argument(5, lambda b: "bias"), "have biases"),
    ],
)
def test_leaves_alone_with_a_reason(spoil, reason: str) -> None:
    case = _prepared(family_case("deepseek_v3"))
    spoil(case)
    result = FuseSharedExperts().run(case.gm, PassContext(read=case.read))
    assert not result.changed and result.ledger.refused
    assert all(reason in r for r in reasons(result.ledger))


@pytest.mark.null
def test_runs_twice_as_once() -> None:
    check_runs_once(FuseSharedExperts(), _prepared(family_case("deepseek_v3")))


@pytest.mark.null
def test_bad_input_names_the_pass() -> None:
    check_bad_input(FuseSharedExperts(), _prepared(family_case("deepseek_v3")))


@pytest.mark.null
def test_segments_in_the_wrong_order_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate rows taken for up rows: evidence names the pass and the layer."""
    from moec.passes import fuse_shared_experts

    right = fuse_shared_experts._segments_in

    def swapped(w, num_shared):
        return [type(s)(s.op, s.args, s.inputs[::-1], s.shape, s.dtype) for s in right(w, num_shared)]

    monkeypatch.setattr(fuse_shared_experts, "_segments_in", swapped)
    with pytest.raises(PassError, match="pass fuse-shared-experts: layer 1"):
        _prepared(family_case("deepseek_v3")).apply(FuseSharedExperts())


@pytest.mark.null
def test_recipes_cut_a_wide_expert_into_experts() -> None:
    """Every part of every segment, against slicing the tensors themselves."""
    from moec.passes.fuse_shared_experts import _segments_in, _segments_out

    tensors = {"in": torch.randn(12, 5), "out": torch.randn(5, 6)}  # F = 2, three shared experts
    w_in, w_out = source("in", (12, 5), torch.float32), source("out", (5, 6), torch.float32)
    for i, (a, b) in enumerate(zip(_segments_in(w_in, 3), _segments_out(w_out, 3), strict=True)):
        rows = torch.cat([tensors["in"][2 * i : 2 * i + 2], tensors["in"][6 + 2 * i : 8 + 2 * i]])
        assert torch.equal(a.materialise(tensors.__getitem__), rows)
        assert torch.equal(b.materialise(tensors.__getitem__), tensors["out"][:, 2 * i : 2 * i + 2])
