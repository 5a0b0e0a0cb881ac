"""fuse-qkv: projections of one value become one product and views of it."""

from __future__ import annotations

import pytest
import torch
from passing import check_bad_input, check_runs_once, check_same, family_case, function_case, reasons
from torch.nn import functional as F

from moec.passes.fuse_qkv import FuseQkv
from moec.passes.infra.errors import PassError
from moec.passes.ir.text import graph_text
from moec.passes.ir.weights import concat, weights_of

aten = torch.ops.aten


def _matrix(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {"q": _matrix(8, 8, seed=0), "k": _matrix(4, 8, seed=1), "v": _matrix(4, 8, seed=2), "b": _matrix(4, seed=3)}


def _attention(m, x):
    q, k, v = F.linear(x, m.q), F.linear(x, m.k), F.linear(x, m.v)
    return q.view(x.shape[0], 2, 4) * (k * v)[:, None]


@pytest.mark.null
def test_fires(golden) -> None:
    case = function_case(_attention, _matrix(5, 8, seed=4), **WEIGHTS)
    before, text = case.value(), graph_text(case.gm)
    ledger = case.apply(FuseQkv())["fuse-qkv"]
    assert len(ledger.matched) == 1 and case.count(aten.linear.default) == 1
    check_same(before, case.value(), 1e-6)
    golden("attention", text + graph_text(case.gm))


@pytest.mark.null
def test_strides_of_later_values_are_those_of_the_slices() -> None:
    """A slice of the packed product is no contiguous tensor, and no value may still claim that it is."""
    case = function_case(_attention, _matrix(5, 8, seed=4), **WEIGHTS)
    case.apply(FuseQkv())
    (view,) = [n for n in case.gm.graph.nodes if n.name == "view"]
    assert not view.meta["val"].is_contiguous() and view.meta["val"].stride()[0] == 16


@pytest.mark.null
@pytest.mark.parametrize(("family", "groups"), [("mixtral", 3), ("qwen2_moe", 3), ("gpt_oss", 3), ("deepseek_v3", 3)])
def test_means_the_same_on_models(family: str, groups: int) -> None:
    case = family_case(family)
    before = case.value()
    ledger = case.apply(FuseQkv())["fuse-qkv"]
    attention = [m for m in ledger.matched if "self_attn" in _weight(case, m.node)]
    assert len(attention) == groups and not ledger.refused
    # the same dot products in a wider product, whose blocks may be summed otherwise
    check_same(before, case.value(), 1e-5)


def _weight(case, name: str) -> str:
    (node,) = [n for n in case.gm.graph.nodes if n.name == name]
    return str(node.args[1].target)


@pytest.mark.null
@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: F.linear(x, m.k, m.b) * F.linear(x, m.v), "only some of linear, linear_1 have a bias"),
        (lambda m, x: F.linear(x, m.k * 2) * F.linear(x, m.v), "is computed in the graph"),
    ],
)
def test_leaves_alone_with_a_reason(forward, reason: str) -> None:
    case = function_case(forward, _matrix(5, 8, seed=4), **WEIGHTS)
    before = case.value()
    ledger = case.apply(FuseQkv())["fuse-qkv"]
    assert not ledger.matched and reason in reasons(ledger)[0]
    check_same(before, case.value())


@pytest.mark.null
def test_a_projection_on_its_own_is_no_site() -> None:
    case = function_case(lambda m, x: F.linear(x, m.k), _matrix(5, 8, seed=4), **WEIGHTS)
    assert not case.apply(FuseQkv())["fuse-qkv"].sites


@pytest.mark.null
def test_runs_twice_as_once() -> None:
    check_runs_once(FuseQkv(), family_case("mixtral"))


@pytest.mark.null
def test_bad_input_names_the_pass() -> None:
    check_bad_input(FuseQkv(), function_case(_attention, _matrix(5, 8, seed=4), **WEIGHTS))


@pytest.mark.null
def test_weights_in_the_wrong_order_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from moec.passes import fuse_qkv

    def reversed_(gm, nodes):
        weights = [weights_of(gm)[str(n.target)] for n in nodes]
        return fuse_qkv.weight_node(gm, "wrong", concat(weights[::-1], 0))

    monkeypatch.setattr(fuse_qkv, "_joined", reversed_)
    with pytest.raises(PassError, match=r"pass fuse-qkv: layer \d"):
        family_case("mixtral").apply(FuseQkv())
