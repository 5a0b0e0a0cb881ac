"""Graph surgery: replacements keep names, regions end where they should, shapes are compared symbolically."""

from __future__ import annotations

import pytest
import torch
from graphs import Builder

from moec.passes.infra.errors import PassError
from moec.passes.infra.rewrite import call, call_many, calls, cut, remove_dead, replace, replace_or_cast, weighs

aten, moec = torch.ops.aten, torch.ops.moec


@pytest.mark.null
def test_replace_keeps_name_uses_and_layer() -> None:
    b = Builder()
    x = b.input("x", 4)
    old = b(aten.relu.default, x)
    old.meta["layer"] = 3
    user = b(aten.neg.default, old)
    gm = b.done(user)
    with gm.graph.inserting_before(old):
        new = call(gm.graph, aten.sigmoid.default, (x,))
    name = old.name
    replace(old, new)
    assert new.name == name and user.args == (new,) and new.meta["layer"] == 3
    gm.graph.lint()
    assert call(gm.graph, aten.relu.default, (x,)).name != name


@pytest.mark.null
def test_replace_refuses_another_shape_or_dtype() -> None:
    b = Builder()
    x = b.input("x", 4)
    y = b(aten.relu.default, x)
    z = b(aten.sum.dim_IntList, x, [-1])
    w = b(aten.to.dtype, x, torch.float64)
    b.done(y)
    with pytest.raises(PassError, match=r"relu\w* cannot be replaced by sum\w* .*: expected shape"):
        replace(y, z)
    with pytest.raises(PassError, match=r"expected dtype torch\.float32, got torch\.float64"):
        replace(y, w)


@pytest.mark.null
def test_casts_only_for_readers_that_need_one() -> None:
    b = Builder()
    scores = b.input("scores", 8)
    chosen = b(aten.argmax.default, scores, -1, True)
    b.done(b(aten.gather.default, scores, 1, chosen))
    with b.gm.graph.inserting_before(chosen):
        _, experts = call_many(b.gm.graph, moec.gate.default, (scores, None, '{"top_k":1}'))
    replace_or_cast(chosen, experts)
    (gather,) = b.gm.graph.find_nodes(op="call_function", target=aten.gather.default)
    assert gather.args[2].target is aten.to.dtype and gather.args[2].meta["val"].dtype == torch.int64


@pytest.mark.null
def test_cut_stops_and_sorts_what_it_reads() -> None:
    b = Builder()
    x, w = b.input("x", 4), b.weight("w", 8, 4)
    linear = b(aten.linear.default, x, w)
    rows = b(aten.sym_size.int, x, 0)
    zeros = b(aten.zeros_like.default, x)
    scores = b(aten.softmax.int, linear, -1)
    wide = b(aten.view.default, scores, [rows, 2, 4])
    out = b(aten.add.Tensor, b(aten.type_as.default, wide, zeros), 1.0)
    b.done(out)
    region = cut((out,), weighs)
    assert region.inputs == (linear,) and region.sizes == (rows,) and region.templates == (zeros,)
    assert [n.target for n in region.nodes] == [
        aten.softmax.int, aten.view.default, aten.type_as.default, aten.add.Tensor
    ]  # fmt: skip
    assert cut((out,), weighs, limit=2) is None


@pytest.mark.null
def test_products_of_moving_values_do_not_weigh() -> None:
    b = Builder()
    x, w = b.input("x", 4), b.weight("w", 8, 4)
    turned = b(aten.t.default, b(aten.to.dtype, w, torch.float32))
    with_weight = b(aten.mm.default, x, turned)
    without = b(aten.einsum.default, "te,te->t", [with_weight, with_weight])
    b.done(without)
    assert weighs(with_weight) and not weighs(without)


@pytest.mark.null
def test_dead_calls_go_and_cache_writes_stay() -> None:
    b = Builder()
    x = b.input("x", 4)
    b(aten.relu.default, b(aten.neg.default, x))
    write = b(aten.copy_.default, x, x)
    b.done(b(aten.exp.default, x))
    assert remove_dead(b.gm) == 2
    assert write in b.gm.graph.nodes and not list(calls(b.gm, aten.relu.default, aten.neg.default))
