"""eliminate-dead-code: unread calls and weights go, writes stay."""

from __future__ import annotations

import pytest
import torch
from passing import Case, check_runs_once, check_same, family_case, function_case

from moec.passes.eliminate_dead_code import EliminateDeadCode
from moec.passes.infra.base import PassContext
from moec.passes.ir.text import graph_text
from moec.passes.ir.weights import add_weight, source, weights_of

aten = torch.ops.aten


def _with_dead_parts() -> Case:
    case = function_case(lambda m, x: x + m.w, torch.randn(5, 4), w=torch.ones(4))
    x = next(iter(case.gm.graph.nodes))
    with case.gm.graph.inserting_after(x):
        dead = case.gm.graph.call_function(aten.neg.default, (x,))
        dead.meta["val"] = x.meta["val"]
    with case.gm.graph.inserting_after(dead):
        case.gm.graph.call_function(aten.relu.default, (dead,)).meta["val"] = x.meta["val"]
    add_weight(case.gm, "unread", source("unread", (4,), torch.float32))
    return case


@pytest.mark.null
def test_fires(golden) -> None:
    case = _with_dead_parts()
    before = case.value()
    text = graph_text(case.gm)
    case.apply(EliminateDeadCode())
    assert not case.count(aten.neg.default) and not case.count(aten.relu.default)
    assert list(weights_of(case.gm)) == ["w"] and not hasattr(case.gm, "unread")
    check_same(before, case.value())
    golden("dead_chain", text + graph_text(case.gm))


@pytest.mark.null
def test_keeps_cache_writes_and_inputs() -> None:
    case = family_case("mixtral")
    attention = torch.ops.moec.cached_attention.default
    inputs = len(case.gm.graph.find_nodes(op="placeholder"))
    for node in case.gm.graph.find_nodes(op="call_function", target=attention):
        node.replace_all_uses_with(node.args[0])
    case.apply(EliminateDeadCode())
    assert case.count(attention) == 3
    assert len(case.gm.graph.find_nodes(op="placeholder")) == inputs


@pytest.mark.null
def test_says_so_where_nothing_is_dead() -> None:
    case = function_case(lambda m, x: x + m.w, torch.randn(5, 4), w=torch.ones(4))
    assert not EliminateDeadCode().run(case.gm, PassContext()).changed


@pytest.mark.null
def test_runs_twice_as_once() -> None:
    check_runs_once(EliminateDeadCode(), _with_dead_parts())
