"""Cut and verify: single-entry cuts, agreement, kinds."""

from __future__ import annotations

import pytest
import torch
from passing import family_case, function_case

from moec.passes.infra.verify import (
    CLOSE,
    EXACT,
    agreement,
    constant_nodes,
    kind_of,
    random_like,
    run,
    single_entries,
)

aten = torch.ops.aten


@pytest.mark.null
def test_cuts_grow_from_one_entry_to_the_next() -> None:
    case = function_case(
        lambda m, x: (y := x.exp()).sin() * y.cos() + m.w.float().neg(), torch.randn(5, 4), w=torch.ones(4)
    )
    constants = constant_nodes(case.gm)
    (output,) = case.gm.graph.output_node().all_input_nodes
    cuts = list(single_entries(output, constants))
    assert [c.entry.name for c in cuts] == ["mul", "exp", "x"]
    assert [n.name for n in cuts[1].nodes] == ["sin", "cos", "mul", "neg", "add"]
    assert [w.name for w in cuts[0].weights] == ["w"]
    x = random_like(cuts[1].entry, torch.Generator().manual_seed(0))
    got = run(cuts[1].nodes, {cuts[1].entry: x, cuts[1].weights[0]: torch.full((4,), 2.0)}, output)
    assert torch.equal(got, x.sin() * x.cos() - 2.0)


@pytest.mark.null
def test_a_declared_leaf_does_not_move() -> None:
    case = function_case(lambda m, x: x.exp() * x.sin(), torch.randn(5, 4))
    (output,) = case.gm.graph.output_node().all_input_nodes
    by_name = {n.name: n for n in case.gm.graph.nodes}
    (first, *_) = single_entries(output, set(), lambda n: n.name == "sin")
    assert first.entry is by_name["exp"] and first.leaves == (by_name["sin"],)


@pytest.mark.null
def test_the_limit_ends_the_walk() -> None:
    case = function_case(lambda m, x: x.sin().cos().sin().cos(), torch.randn(5, 4))
    (output,) = case.gm.graph.output_node().all_input_nodes
    assert len(list(single_entries(output, set(), limit=2))) == 2


@pytest.mark.null
def test_agreement_grades() -> None:
    x = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    assert agreement(x, x.clone()) == EXACT
    assert agreement(x, x * (1 + 2e-7)) == CLOSE
    assert agreement(x, x * (1 + 1e-5)) is None
    assert agreement(x, x.double()) is None and agreement(x, x[:1]) is None
    nan = x.clone()
    nan[3] = float("nan")
    assert agreement(nan, nan.clone()) == EXACT
    assert agreement(nan, x) is None and agreement(x, nan) is None
    half = x.to(torch.bfloat16)
    tipped = half.clone()
    up = (half.view(torch.int16) + 1).view(torch.bfloat16)  # each value's neighbour
    tipped[0, :10] = up[0, :10]
    assert agreement(half, tipped) == CLOSE
    assert agreement(half, up) is None, "one unit everywhere is another formula"


@pytest.mark.null
def test_layers_of_a_kind_have_equal_keys() -> None:
    """And a norm over the heads is another kind than one over the hidden size."""
    case = family_case("qwen3_moe")
    constants = constant_nodes(case.gm)
    kinds = set()
    for node in case.gm.graph.find_nodes(op="call_function", target=aten.rsqrt.default):
        (product,) = node.users
        kinds.add(kind_of(next(iter(single_entries(product, constants)))))
    assert len(kinds) == 3  # hidden size, query heads, key heads
