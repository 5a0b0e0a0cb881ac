"""The norm kernels against the plain op: any width, any layout, both vector widths."""

import dataclasses

import pytest
import torch

from moec.compiler.kernels.checks import KernelArgumentError
from moec.compiler.kernels.norm import add_rms_norm as add
from moec.compiler.kernels.norm import rms_norm as rms
from moec.compiler.kernels.norm.row import NormProblem
from moec.passes.ir import ops

pytestmark = pytest.mark.cpu

WIDTHS = [1, 7, 16, 100, 1000]  # scalars only, tails, whole vectors, blocks of 4 vectors with both tails
VARIANTS = [
    {},
    {"cast": "after_weight"},
    {"centre": True},
    {"weight_dtype": None},
    {"weight_dtype": "float32"},
]


def tolerance(dtype):
    # bf16: the sum in another order may tip one rounding of 2**-8; f32: a few roundings of 2**-24
    return 2**-7 if dtype == torch.bfloat16 else 2e-6


def problems(dtype, **more):
    return [NormProblem(hidden=100, dtype=dtype, **({"weight_dtype": dtype} | variant | more)) for variant in VARIANTS]


def weight_of(problem, *shape):
    return None if problem.weight_dtype is None else torch.randn(*shape).to(getattr(torch, problem.weight_dtype))


def close(got, want):
    if want.numel():
        error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)
        assert error <= tolerance(want.dtype)
    assert got.dtype == want.dtype and got.shape == want.shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_equals_the_op(load, level, dtype):
    cases = problems(dtype)
    library = load({name: f for p in cases for name, f in rms.build(p, level).items()}, level)
    for problem in cases:
        for width in WIDTHS:
            for tokens in (0, 1, 5):
                x = torch.randn(tokens, width).to(getattr(torch, dtype))
                w = weight_of(problem, width)
                got = rms.rms_norm(library, problem, x, w, 1e-5, offset=1.0)
                close(got, ops.normalise(x, w, 1e-5, problem.cast, 1.0, problem.centre).to(x.dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_add_rms_norm_equals_the_op(load, level, dtype):
    cases = problems(dtype)[:4:2]  # the row itself is tested above
    library = load({name: f for p in cases for name, f in add.build(p, level).items()}, level)
    for problem in cases:
        for width in WIDTHS:
            x, r = torch.randn(2, 3, width).to(getattr(torch, dtype))
            w = weight_of(problem, width)
            normed, total = add.add_rms_norm(library, problem, x, r, w, 1e-5)
            want, want_total = ops.add_rms_norm(x, r, w, 1e-5, problem.cast, 0.0, problem.centre)
            close(normed, want)
            assert torch.equal(total, want_total)


def test_heads_of_a_fused_projection_with_a_weight_per_head(load, level):
    """QK norm on a slice of a fused projection: strided on both outer axes, unaligned."""
    for per_head in (False, True):
        problem = NormProblem(24, "float32", "float32", heads=True, weight_per_head=per_head)
        library = load(rms.build(problem, level), level)
        x = torch.randn(3, 9, 25)[:, 2:7, 1:]
        w = weight_of(problem, *((5, 24) if per_head else (24,)))
        close(rms.rms_norm(library, problem, x, w, 1e-6), ops.normalise(x, w, 1e-6, "before_weight", 0.0, False))


def test_many_rows_run_on_all_threads(load, level):
    torch.set_num_threads(2)
    problem = NormProblem(256, "float32", "float32")
    library = load(rms.build(problem, level), level)
    x, w = torch.randn(300, 256), torch.randn(256)
    assert x.numel() > rms.SERIAL_ELEMENTS
    close(rms.rms_norm(library, problem, x, w, 1e-6), ops.normalise(x, w, 1e-6, "before_weight", 0.0, False))


def test_a_nan_stays_in_its_row(load, level):
    problem = NormProblem(40, "bfloat16")
    library = load(rms.build(problem, level), level)
    x = torch.randn(3, 40).bfloat16()
    x[1, 5] = float("nan")
    y = rms.rms_norm(library, problem, x, torch.ones(40).bfloat16(), 1e-6)
    assert y.isnan().all(-1).tolist() == [False, True, False]


def test_a_transposed_input_is_copied_by_the_wrapper(load, level):
    problem = NormProblem(12, "float32", None)
    library = load(rms.build(problem, level), level)
    x = torch.randn(12, 4).t()
    close(rms.rms_norm(library, problem, x, None, 1e-6), ops.normalise(x, None, 1e-6, "before_weight", 0.0, False))


def test_refusals_and_bad_arguments_name_the_reason(load, level):
    problem = NormProblem(12, "float16")
    assert rms.SPECS[0].supports(problem) == "x is float16, not float32 or bfloat16"
    assert add.SPECS[0].supports(NormProblem(12, heads=True)) == "x is [T,Q,H], only [T,H] is built"
    good = dataclasses.replace(problem, dtype="float32", weight_dtype="float32")
    library = load(rms.build(good, level), level)
    with pytest.raises(KernelArgumentError, match="a weight is given, or missing"):
        rms.rms_norm(library, good, torch.randn(2, 12), None, 1e-6)
    with pytest.raises(KernelArgumentError, match="x has 3 axes"):
        rms.rms_norm(library, good, torch.randn(2, 2, 12), torch.randn(12), 1e-6)
