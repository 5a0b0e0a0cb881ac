"""Packed stacks of experts: filled expert by expert, with what packing the whole stack gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moec.compiler.kernels.experts import layout
from moec.compiler.lowering.packing import DOWN, DTYPES, GATE_UP, make
from moec.passes.ir.weights import Weight, concat, pack, source, stack

pytestmark = pytest.mark.null
EXPERTS, HIDDEN, INNER = 4, 48, 40


def gate_up() -> tuple[Weight, dict[str, Tensor]]:
    """Gate and up projections of a tensor each, as Mixtral has them, stacked and joined: [E, 2F, H]."""
    names = [f"{half}{e}" for half in ("gate", "up") for e in range(EXPERTS)]
    tensors = {n: torch.randn(INNER, HIDDEN, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(names)}
    halves = [[source(n, (INNER, HIDDEN), torch.float32) for n in names if n.startswith(h)] for h in ("gate", "up")]
    return concat([stack(half) for half in halves], 1), tensors


def down() -> tuple[Weight, dict[str, Tensor]]:
    """[E, H, F]."""
    tensors = {f"e{e}": torch.randn(HIDDEN, INNER, generator=torch.Generator().manual_seed(e)) for e in range(EXPERTS)}
    return stack([source(n, (HIDDEN, INNER), torch.float32) for n in tensors]), tensors


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("kind", [GATE_UP, DOWN])
def test_experts_are_packed_one_by_one(kind: str, name: str) -> None:
    weight, tensors = gate_up() if kind == GATE_UP else down()
    whole = weight.materialise(tensors.__getitem__)
    expected = layout.pack_gate_up(whole, name) if kind == GATE_UP else layout.pack_down(whole, name)
    order: list[str] = []

    def read(source_name: str) -> Tensor:
        order.append(source_name)
        return tensors[source_name]

    text = f"{kind}:{name}:{'gated' if kind == GATE_UP else 'plain'}"
    packed = make(pack(weight, text, (), tuple(expected.shape), DTYPES[name]), read)
    assert torch.equal(packed, expected)
    assert order == sorted(tensors, key=lambda n: n[-1])  # all of an expert's tensors before the next one's
