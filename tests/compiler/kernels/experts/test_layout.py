"""Packed expert weights: where every weight lies, padding, and what is refused."""

import pytest
import torch

from moec.compiler.kernels.experts import layout

pytestmark = pytest.mark.null


def _vnni(packed, e, column, k):
    """The weight at (column, k) of an expert, by the definition of vnni32."""
    depth = packed.shape[2] // 32
    blocks = packed.view(packed.shape[0], packed.shape[1], depth // 32, 2, 16, 16, 2)
    return blocks[e, column // 32, k // 32, column % 32 // 16, k % 32 // 2, column % 16, k % 2]


def _row(packed, e, column, k):
    return packed.view(packed.shape[0], packed.shape[1], -1, 32)[e, column // 32, k, column % 32]


@pytest.mark.parametrize(("name", "at"), [("vnni32", _vnni), ("row32", _row)])
def test_every_weight_is_where_the_definition_says(name, at):
    w = torch.arange(2 * 40 * 33, dtype=torch.float32).reshape(2, 40, 33) / 16  # F = 20, H = 33
    packed = layout.pack_gate_up(w, name)
    assert packed.shape == (2, 2, 64 * 32)
    for e, f, k in ((0, 0, 0), (1, 19, 32), (1, 7, 31), (0, 16, 1)):
        column = f // 16 * 32 + f % 16
        assert at(packed, e, column, k) == w[e, f, k].to(packed.dtype)
        assert at(packed, e, column + 16, k) == w[e, 20 + f, k].to(packed.dtype)
    assert packed.float().sum(dtype=torch.float64) == w.to(packed.dtype).sum(dtype=torch.float64)  # the rest is zero
    down = layout.pack_down(w, name)
    assert down.shape == (2, 2, 64 * 32)
    assert at(down, 1, 39, 32) == w[1, 39, 32].to(down.dtype) and at(down, 1, 40, 3) == 0


def test_without_gate_columns_follow_each_other():
    w = torch.randn(1, 40, 32)
    packed = layout.pack_gate_up(w, "row32", gated=False)
    assert packed.shape == (1, 2, 32 * 32)
    assert _row(packed, 0, 33, 5) == w[0, 33, 5]


def test_biases_follow_the_panels():
    b = torch.arange(40, dtype=torch.float32)[None]
    packed = layout.pack_bias_gate_up(b)
    assert packed.shape == (1, 64)
    assert packed[0, :16].tolist() == list(range(16)) and packed[0, 16:32].tolist() == list(range(20, 36))
    assert packed[0, 32:36].tolist() == [16, 17, 18, 19] and not packed[0, 36:48].any()
    assert layout.pack_bias_down(b).shape == (1, 64)


def test_packs_into_a_given_tensor():
    w = torch.randn(3, 64, 32)
    out = torch.empty(layout.packed_shape(3, 64, 32), dtype=torch.bfloat16)
    assert layout.pack_gate_up(w, "vnni32", out=out) is out
    assert torch.equal(out, layout.pack_gate_up(w, "vnni32"))
    with pytest.raises(ValueError, match=r"expected torch.bfloat16 \(3, 2, 1024\), got torch.float32"):
        layout.pack_gate_up(w, "vnni32", out=out.float())
