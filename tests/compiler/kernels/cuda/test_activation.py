"""Every activation of passes/ir/activation.py on a GPU's registers, in emulation against float64."""

import pytest
import torch
from tvm.tirx.script import builder as T

from moec.compiler.kernels.cuda.activation import activate
from moec.compiler.kernels.cuda.emit import define, size, tensor
from moec.passes.ir.activation import FUNCTIONS, Activation

pytestmark = pytest.mark.null

NAMES = (
    *FUNCTIONS, *(f"!{name}" for name in FUNCTIONS), "silu@1.5", "f32:silu", "gelu_tanh@0.5", "swigluoai@7.0@1.702",
    "swigluoai@0.5@1.0", "f32:softcapglu@7.0@9.0", "softcapglu@0.5@2.0",
)  # fmt: skip


def all_activations():
    def body():
        n = size("n")
        h, y = tensor("h", (n, 2), "float32"), tensor("y", (len(NAMES), n), "float32")
        T.device_entry()
        i = T.Bind(T.cta_id([T.ceildiv(n, 32)]) * 32 + T.thread_id([32]))
        with T.If(i < n), T.Then():
            for a, name in enumerate(NAMES):
                activation = Activation.parse(name)
                value = activate(activation, h[i, 0], h[i, 1] if activation.gated else None)
                T.buffer_store(y, value, [a, i])

    return define(body)


def test_every_activation(emulated, run):
    """f32 functions of an f32 number: a few units in the last place, of the largest term where terms cancel."""
    torch.manual_seed(0)
    h = torch.randn(90, 2) * 3
    h[0], h[1] = 0.0, torch.tensor([-30.0, 30.0])
    y = run(emulated("all", all_activations()), {"h": h, "y": torch.empty(len(NAMES), 90), "n": 90})["y"]
    for name, got in zip(NAMES, y, strict=True):
        gated = Activation.parse(name).gated
        want = Activation.parse(name.replace("f32:", ""))(h.double() if gated else h[:, :1].double())[:, 0]
        scale = 1 + h.double().abs().amax(1) ** 2
        assert ((got.double() - want).abs() / scale).max() < 1e-6, name
    nan = torch.full((1, 2), float("nan"))
    got = run(emulated("all", all_activations()), {"h": nan, "y": torch.empty(len(NAMES), 1), "n": 1})["y"]
    assert got.isnan().all()
