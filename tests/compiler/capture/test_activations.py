import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moec.compiler.capture.activations import activation_name, gate_first
from moec.compiler.errors import UnsupportedModel

pytestmark = pytest.mark.null


class Experts(nn.Module):
    """The part of a transformers experts module that naming looks at."""

    def __init__(self, gate=None, act_fn=None, concatenated=True, **numbers):
        super().__init__()
        self.has_gate, self.is_concatenated = gate is not None, concatenated
        self._gate, self.act_fn = gate, act_fn
        for name, value in numbers.items():
            setattr(self, name, value)

    def _apply_gate(self, h):
        return self._gate(h)


def swiglu(h):
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def wide(h):
    gate, up = h.float().chunk(2, -1)
    return (F.silu(gate) * up).to(h.dtype)


def clamped(h):
    gate, up = h.chunk(2, -1)
    return F.silu(gate.clamp(max=7.0)) * up.clamp(-7.0, 7.0)


def gpt_oss(h):
    gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


@pytest.mark.parametrize(
    ("experts", "name"),
    [
        (Experts(swiglu), "silu"),
        (Experts(wide), "f32:silu"),
        (Experts(clamped, swiglu_limit=7.0), "silu@7.0"),
        (Experts(gpt_oss, concatenated=False, limit=7.0, alpha=1.702), "swigluoai@7.0@1.702"),
        (Experts(lambda h: F.gelu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]), "gelu"),
        (Experts(act_fn=lambda h: F.relu(h).square()), "!relu2"),
    ],
)
def test_names(experts, name):
    assert activation_name(experts) == name


@pytest.mark.parametrize(
    "gate",
    [
        lambda h: F.mish(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
        lambda h: swiglu(h) * 1.001,
        clamped,  # its limit is nowhere on the module
        lambda h: swiglu(torch.cat(h.chunk(2, -1)[::-1], -1)),  # up first
    ],
)
def test_what_is_nearly_known_is_refused(gate):
    with pytest.raises(UnsupportedModel, match="equals none of"):
        activation_name(Experts(gate))


def test_gate_first():
    assert gate_first(torch.arange(6)).tolist() == [0, 2, 4, 1, 3, 5]


class Softcap(nn.Module):
    def __init__(self, softcap):
        super().__init__()
        self.softcap = softcap

    def forward(self, x):
        return torch.tanh(x / self.softcap) * self.softcap


def test_soft_caps_of_submodules_are_found():
    experts = Experts(gate=lambda h: None)
    experts.of_gate, experts.of_up = Softcap(7.0), Softcap(9.0)

    def gate(h):
        gate, up = h.float().chunk(2, -1)
        return (experts.of_gate(gate) * torch.sigmoid(gate) * experts.of_up(up)).to(h.dtype)

    experts._gate = gate
    assert activation_name(experts) == "f32:softcapglu@7.0@9.0"
