"""lift-rope: all rotations of the 15 families become one op on half-width tables; other readers of tables stay."""

from __future__ import annotations

import pytest
import torch
from passing import CASES, Case, check_bad_input, check_runs_once, check_same, family_case, reasons
from torch import Tensor

from moec.compiler.capture.entry import capture
from moec.passes.ir.text import graph_text
from moec.passes.lift_rope import LiftRope

ROPE = torch.ops.moec.rope.default
FORMS = {
    "deepseek_v2": "interleaved, 8 columns",
    "deepseek_v3": "deinterleaved, 8 columns",
    "llama4_text": "interleaved, 8 columns",
    "ernie4_5_moe": "interleaved, 8 columns",
    "glm4_moe": "half, 4 columns",
    "minimax_m2": "half, 4 columns",
}
IN_FLOAT32 = ("deepseek_v2", "llama4_text", "ernie4_5_moe")


@pytest.mark.null
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_no_rotation_of_a_family_is_missed(family: str, dtype: torch.dtype) -> None:
    case = family_case(family, dtype)
    before = case.value()
    ledger = case.apply(LiftRope())["lift-rope"]
    assert len(ledger.matched) == 6 and not ledger.refused  # queries and keys of three layers
    form = FORMS.get(family, "half, 8 columns")
    computed = "float32" if family in IN_FLOAT32 and dtype == torch.bfloat16 else "input"
    assert all(m.detail.startswith(f"{form}, computed in {computed}") for m in ledger.matched)
    tables = {n for r in case.gm.graph.find_nodes(op="call_function", target=ROPE) for n in r.args[1:3]}
    assert len(tables) == 2
    assert {t.meta["val"].dim() for t in tables} == {2}
    # complex products may use fused multiply-add: a last bit of float32, which may tip a rounding to bf16
    is_complex = family in ("deepseek_v2", "llama4_text")
    check_same(before, case.value(), is_complex * (1e-6 if dtype == torch.float32 else 2**-6))


class Rotated(torch.nn.Module):
    """q [T, Q, D] and positions [T] -> rotate(q as [1, Q, T, D], angles [1, T, R/2]) back as [T, Q, D]."""

    def __init__(self, rotate, columns: int = 8) -> None:
        super().__init__()
        self.rotate = rotate
        self.inv_freq = torch.nn.Parameter(1e4 ** (-torch.arange(columns // 2) / (columns // 2)), requires_grad=False)

    def forward(self, q: Tensor, positions: Tensor) -> Tensor:
        angles = positions[None, :, None].float() * self.inv_freq
        return self.rotate(q.transpose(0, 1)[None], angles)[0].transpose(0, 1)


def _half(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = q.chunk(2, -1)
    return q * cos + torch.cat([-b, a], -1) * sin


def _tables(angles: Tensor, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    wide = torch.cat([angles, angles], -1)[:, None]
    return (wide.cos() * scale).to(dtype), (wide.sin() * scale).to(dtype)


def _float32(q: Tensor, angles: Tensor) -> Tensor:
    return _half(q.float(), *_tables(angles, torch.float32)).to(q.dtype)


def _interleaved_tables(q: Tensor, angles: Tensor) -> Tensor:
    wide = torch.repeat_interleave(angles, 2, -1)[:, None].float()
    turned = torch.stack([-q[..., 1::2], q[..., ::2]], -1).flatten(-2)
    return (q.float() * wide.cos() + turned.float() * wide.sin()).to(q.dtype)


def _partial(q: Tensor, angles: Tensor) -> Tensor:
    return torch.cat([_half(q[..., :4], *_tables(angles, q.dtype)), q[..., 4:]], -1)


MORE_FORMS = {
    "float32 with a last cast": (_float32, 8, "half, 8 columns, computed in float32"),
    "interleaved, repeat_interleave on the angles": (
        _interleaved_tables,
        8,
        "interleaved, 8 columns, computed in float32",
    ),
    "scaled tables": (lambda q, a: _half(q, *_tables(a, q.dtype, 1.25)), 8, "half, 8 columns, computed in input"),
    "partial": (_partial, 4, "half, 4 columns, computed in input"),
}


def _case(rotate, columns: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    q = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    inputs = (q, torch.arange(5))
    captured = capture(Rotated(rotate, columns), inputs)
    return Case(captured.graph_module, captured.read, inputs)


@pytest.mark.null
@pytest.mark.parametrize("form", MORE_FORMS)
def test_fires_on_forms_outside_of_the_families(form: str) -> None:
    rotate, columns, detail = MORE_FORMS[form]
    case = _case(rotate, columns)
    before = case.value()
    ledger = case.apply(LiftRope())["lift-rope"]
    assert [m.detail for m in ledger.matched] == [f"{detail}, from 1QTD"] and not ledger.refused
    check_same(before, case.value())


@pytest.mark.null
def test_golden(golden) -> None:
    case = _case(lambda q, a: _half(q, *_tables(a, q.dtype)), 8)
    before = graph_text(case.gm)
    case.apply(LiftRope())
    golden("half", before + graph_text(case.gm))


NEAR_MISSES = {
    "both halves with the same sign": lambda q, a: (
        _half(q, *(t.abs() for t in _tables(a, q.dtype))) + q * _tables(a, q.dtype)[0]
    ),
    "turned the other way": lambda q, a: (
        q * _tables(a, q.dtype)[0] - torch.cat([-q[..., 4:], q[..., :4]], -1) * _tables(a, q.dtype)[1]
    ),
    "one table only": lambda q, a: q * _tables(a, q.dtype)[0],
}


@pytest.mark.null
@pytest.mark.parametrize("near_miss", NEAR_MISSES)
def test_leaves_alone_what_is_no_rotation(near_miss: str) -> None:
    case = _case(NEAR_MISSES[near_miss], 8)
    before = case.value()
    ledger = case.apply(LiftRope())["lift-rope"]
    assert not ledger.matched and ledger.refused
    known = ("equals no form", "does not read one table", "no region around it", "goes through")
    assert all(any(k in r for k in known) for r in reasons(ledger))
    check_same(before, case.value())


@pytest.mark.null
def test_runs_twice_as_once() -> None:
    check_runs_once(LiftRope(), family_case("deepseek_v3"))


@pytest.mark.null
def test_bad_input_names_the_pass() -> None:
    check_bad_input(LiftRope(), family_case("mixtral"))
