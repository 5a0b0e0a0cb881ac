"""Vector activations against torch in float64, on both vector widths."""

import pytest
import torch
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moec.compiler.codegen.llvm import build_library
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.activation import SUPPORTED, activate
from moec.passes.ir.activation import FUNCTIONS, Activation
from moec.runtime.launch.cpu import load_library
from moec.runtime.launch.cpu_features import missing_features

pytestmark = pytest.mark.cpu

NAMES = [*FUNCTIONS, "silu@7.0", "gelu_tanh@2.0", "swigluoai@7.0@1.702", "swigluoai", "f32:silu", "!relu2", "!gelu"]


def _kernel(name: str, level: str):
    """y[i] = activation(gate[i], up[i]) for whole vectors."""
    lanes, activation = ins.lanes_of(level), Activation.parse(name)
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("f")
        n = T.int64()
        gate, up, y = (T.match_buffer(T.arg(a, T.handle()), (n,), "float32", align=4) for a in ("gate", "up", "y"))
        with ins.intrinsics(level), T.serial(n // lanes) as i:
            place = T.ramp(i * lanes, 1, lanes)
            T.buffer_store(
                y, activate(activation, gate[place] if activation.gated else None, up[place], lanes), [place]
            )
    return ib.get()


@pytest.fixture(scope="module", params=["avx2", "avx512f"])
def library(request, tmp_path_factory):
    if lacking := missing_features(request.param):
        pytest.skip(f"the processor lacks {', '.join(lacking)}")
    kernels = {f"f{i}": _kernel(name, request.param) for i, name in enumerate(NAMES)}
    return load_library(build_library(kernels, request.param, tmp_path_factory.mktemp("act")).path, request.param)


def test_every_function_of_the_grammar_has_vector_code():
    assert set(SUPPORTED) == {*FUNCTIONS, "swigluoai"}


@pytest.mark.parametrize("name", NAMES)
def test_equals_float64(library, name):
    gate = torch.cat([torch.linspace(-30, 30, 3000), torch.tensor([0.0, -0.0, 1e-30, 87.0, -87.0, 200.0, -200.0, 1e4])])
    up = torch.linspace(-9, 9, 3008)
    y = torch.empty(3008)
    library[f"f{NAMES.index(name)}"](gate, up, y)
    activation = Activation.parse(name)
    given = torch.stack([gate, up], 1).double() if activation.gated else up.double()[:, None]
    expected = activation(given)[:, 0]
    # 3e-7 of the result and of what the activation multiplies: 1.5e-7 in erf, an ulp or two elsewhere
    size = (gate * up).abs() if activation.gated else up.abs()
    scale = 1 + expected.abs() + size.double()
    assert ((y.double() - expected).abs() / scale).max() < 3e-7


@pytest.mark.parametrize("name", NAMES)
def test_nan_propagates(library, name):
    y = torch.zeros(16)
    nan, one = torch.full((16,), torch.nan), torch.ones(16)
    library[f"f{NAMES.index(name)}"](nan, one if Activation.parse(name).gated else nan, y)
    assert y.isnan().all()
    if Activation.parse(name).gated:
        library[f"f{NAMES.index(name)}"](one, nan, y)
        assert y.isnan().all()
