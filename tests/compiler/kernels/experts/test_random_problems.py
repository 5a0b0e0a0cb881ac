"""Expert layers of random sizes, formats and options on every kernel of the catalogue, against float64.

Bounds are twice those of experts_codes.py and experts_layer.py in tests/support, which are for outputs of many numbers:
here rows are as short as one number, and one int8 code of 64 that rounds the other way is 3e-3 of its row.
"""

import random

import pytest
from experts_codes import BOUND, reference
from experts_layer import TOLERANCE

from moec.compiler.kernels.experts.catalogue import KERNELS
from moec.compiler.kernels.spec import ExpertsProblem
from moec.runtime.launch.cpu_features import LEVELS, missing_features

pytestmark = pytest.mark.cpu

FORMATS = (
    "", "int8", "int8-w8a8", "int4-g32", "int4-g64", "int4-g128", "int4-g64-asym", "int4-g64-a8", "int3-g32",
    "int3-g64", "int3-g64-a8", "int2-g16", "int2-g64", "int2-g64-a8", "nf4-g64", "mxfp4", "ternary", "fp8",
    "fp8-block128",
)  # fmt: skip
QUICK, ALL = 8, 160


def drawn(seed):
    """A problem and a kernel of this processor that takes it. Sizes are odd where the format lets them be."""
    rng = random.Random(seed)
    for _ in range(1000):
        format, experts = rng.choice(FORMATS), rng.choice((1, 2, 3, 7, 16, 33, 128))
        step = rng.choice((1, 2, 16, 64, 128))
        p = ExpertsProblem(
            step * rng.randint(1, max(1, 400 // step)), step * rng.randint(1, max(1, 400 // step)), experts,
            rng.randint(1, min(experts, 9)), rng.choice((0, 0, 1, 3)), rng.choice(("silu", "gelu", "!relu2", "!silu")),
            "float32" if rng.random() < 0.3 else "bfloat16", rng.random() < 0.3,
            weight_on_input=rng.random() < 0.2, format_up=format, format_down=format,
        )  # fmt: skip
        able = [k for k in KERNELS if not missing_features(k.level) and k.spec().refusal(p, LEVELS[k.level]) is None]
        if able:
            return p, rng.choice(able)
    raise AssertionError("no kernel takes any of these problems")


@pytest.mark.parametrize("seed", [*range(QUICK), *(pytest.param(n, marks=pytest.mark.slow) for n in range(QUICK, ALL))])
def test_any_problem_that_a_kernel_takes_is_right(make_layer, seed):
    problem, kernel = drawn(seed)
    layer = make_layer(kernel, problem)
    for num_tokens in random.Random(seed).sample((1, 2, 5, 16, 31, 64, 129, 300), 4):
        given = layer.inputs(num_tokens, seed=num_tokens)
        if problem.format_up:
            int8 = problem.format_up.endswith("a8")
            expected, bound = reference(layer, *given, int8), BOUND["int8" if int8 else "numbers"]
        else:
            expected, bound = layer.reference(*given), TOLERANCE[problem.dtype]
        error = layer.error(layer.run(*given), expected)
        assert error < 2 * bound, f"{kernel.name} {problem} at {num_tokens} tokens: error {error}"
