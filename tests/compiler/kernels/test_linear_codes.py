"""The linear kernel over stored codes against float64 on the dequantised weight."""

import pytest
import torch
from torch.nn import functional as F

from moec.compiler.kernels.checks import KernelArgumentError
from moec.compiler.kernels.linear.linear_codes import (
    StoredLinearProblem,
    build,
    build_pairs,
    linear_codes,
    linear_pairs,
)
from moec.passes.ir.formats import parse_format
from moec.passes.ir.quantise import dequantise_parts, quantise
from moec.passes.ir.stored import store
from moec.runtime.launch.cpu_features import missing_features

pytestmark = pytest.mark.cpu

TOKENS = (0, 1, 2, 3, 4, 7, 15)  # every block of 8, 4, 2 and 1 tokens, alone and after another
SUMS = 1e-6  # of sum |x||w|: f32 sums of up to 512 products, each rounded to 2**-24
ROUNDING = {"bfloat16": 2**-8, "float32": 0.0}  # of the result: half of the last of its 8 digits is at most that
# rows and columns: rows in no whole block of 4, columns with lines, vectors and single values left over
INT8, INT4 = [(7, 33), (9, 64), (130, 500)], [(7, 128), (130, 512)]
CASES = [("int8", *size) for size in INT8]
CASES += [(name, *size) for name in ("int4-g32", "int4-g64", "int4-g128-f32") for size in INT4]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_dequantised_weight(load, level, dtype):
    check(load, level, dtype, build, linear_codes, TOKENS)


def test_pairs_equal_the_dequantised_weight(load):
    if missing_features("avx512_bf16"):
        pytest.skip("the processor does not multiply pairs of bfloat16")
    check(load, "avx512_bf16", "bfloat16", build_pairs, linear_pairs, TOKENS)


def check(load, level, dtype, build, call, token_counts):
    problems, stored, numbers = {}, {}, {}
    for case in CASES:
        name, rows, columns = case
        format = parse_format(name)
        parts = quantise(torch.randn(rows, columns), format, "w")
        stored[case], numbers[case] = store(parts), dequantise_parts(parts)
        problems[case] = StoredLinearProblem(columns, rows, format, dtype, "float32" if rows == 7 else None)
    library = load({n: f for p in problems.values() for n, f in build(p, level).items()}, level)
    for case, p in problems.items():
        w, b = numbers[case].double(), torch.randn(7) if p.bias_dtype else None
        for tokens in token_counts:
            x = torch.randn(tokens, p.in_features + 1).to(getattr(torch, dtype))[:, 1:]
            got = call(library, p, x, stored[case], b)
            want = F.linear(x.double(), w, None if b is None else b.double())
            scale = F.linear(x.double().abs(), w.abs(), None if b is None else b.double().abs())
            assert ((got.double() - want).abs() <= SUMS * scale + ROUNDING[dtype] * want.abs()).all(), (case, tokens)
            assert got.dtype == x.dtype


def test_refusals_name_the_reason(load, level):
    def refusal(name, columns=512):
        return StoredLinearProblem(columns, 8, parse_format(name)).refusal()

    assert refusal("int8") is None and refusal("int4-g32") is None
    assert StoredLinearProblem(512, 8, parse_format("int8"), "float32").pairs_refusal().startswith("x in float32")
    assert refusal("int8-w8a8").startswith("int8-w8a8: only symmetric int8 and int4")
    assert refusal("int4-g32-asym").startswith("int4-g32-asym: only symmetric")
    assert refusal("nf4-g64").startswith("nf4-g64: only symmetric int8 and int4")
    assert refusal("int8-g64").startswith("int8-g64: int8 with one scale for each row")
    assert "a multiple of 32 each" in refusal("int4-g64", 96)
    problem = StoredLinearProblem(64, 8, parse_format("int8"), "float32")
    library = load(build(problem, level), level)
    with pytest.raises(KernelArgumentError, match=r"the stored weight has shape \(5,\)"):
        linear_codes(library, problem, torch.randn(1, 64), torch.zeros(5, dtype=torch.uint8))
