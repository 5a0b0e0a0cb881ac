"""The vector functions that all kernels share, over their whole range."""

import pytest
import torch
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moec.compiler.kernels.simd import Simd, for_chunks, match

pytestmark = pytest.mark.cpu


def apply(load, level, name, x, dtype="float32"):
    """The function on every value of x, by vectors and by scalars, stored as dtype."""
    v = Simd.of(level)
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(f"test_{name}")
        n = T.int64()
        source, target = match("x", "float32", (n,)), match("y", dtype, (n,))

        def step(at, lanes, _):
            value = v.load(source[at], "float32", lanes)
            if name == "round":
                value = v.rounded(value, "bfloat16", lanes)
            elif name != "store":
                value = v.call(name, value, lanes)
            v.store(target[at], value, dtype, lanes)

        with v.prelude():
            for_chunks(n, v.lanes, 1, step)
    y = torch.empty(x.shape, dtype=getattr(torch, dtype))
    load({f"test_{name}": ib.get()}, level)[f"test_{name}"](x, y)
    return y


def test_exp_is_within_two_units_in_the_last_place(load, level):
    x = torch.cat([torch.linspace(-86, 88, 20001), torch.linspace(-1e-3, 1e-3, 2001)])
    y, want = apply(load, level, "exp", x).double(), x.double().exp()
    assert ((y - want).abs() / want).max() <= 2 * 2**-23


def test_the_ends_of_exp(load, level):
    inf, nan = float("inf"), float("nan")
    y = apply(load, level, "exp", torch.tensor([inf, -inf, nan, 0.0, 100.0, -110.0, -88.0]))
    assert y[:2].tolist() == [inf, 0.0] and y[2].isnan()
    assert y[3:6].tolist() == [1.0, inf, 0.0]
    assert torch.isclose(y[6].double(), torch.tensor(-88.0).double().exp(), rtol=1e-5)  # a subnormal number


def test_sigmoid_and_tanh(load, level):
    x = torch.cat([torch.linspace(-30, 30, 6001), torch.linspace(-0.3, 0.3, 6001)])
    for name, function in (("sigmoid", torch.sigmoid), ("tanh", torch.tanh)):
        y, want = apply(load, level, name, x).double(), function(x.double())
        # an addition, a division and exp: a few units in the last place of a value of at most 1
        assert (y - want).abs().max() <= 4e-7
    assert apply(load, level, "tanh", torch.tensor([float("nan"), float("inf"), -float("inf")])).tolist()[1:] == [1, -1]


def test_rounding_to_bfloat16_equals_torch(load, level):
    bits = torch.arange(0, 2**32, 65521 * 3, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    x = x[(x.abs() >= 2**-126) | x.isnan()]  # the processor's own rounding takes subnormal numbers for zero
    y, want = apply(load, level, "round", x), x.bfloat16().float()
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y[~y.isnan()], want[~y.isnan()])


def test_rounding_to_int8_takes_even_and_keeps_to_the_ends(load, level):
    inf = float("inf")
    ends = torch.tensor([inf, -inf, float("nan"), 1e30, -1e30, 127.5, 128.0, -128.4, -128.6, 4194304.5, -0.0, 1e-40])
    x = torch.cat([torch.arange(-300, 300) / 2, torch.linspace(-130, 130, 1001), ends])
    want = x.nan_to_num(0, inf, -inf).round().clamp(-128, 127).to(torch.int8)
    assert torch.equal(apply(load, level, "store", x, "int8"), want)
