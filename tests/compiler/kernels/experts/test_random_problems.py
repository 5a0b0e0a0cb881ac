"""Expert layers of random sizes, formats, options, knobs and routings on every kernel, against float64.

Bounds are those of experts_codes.py and experts_layer.py in tests/support, which are for outputs of many numbers, times
FACTOR: here rows are as short as one number. Numbers of bf16 often lie half way between two int8 codes, where float32
in the kernels and float64 here choose differently: one such code of 64 in x changes all of h, and y by up to 1.2 %.
"""

import dataclasses
import random

import pytest
import torch
from experts_codes import bound, reference
from experts_layer import TOLERANCE

from moec.compiler.kernels.experts import knobs
from moec.compiler.kernels.experts.catalogue import KERNELS
from moec.compiler.kernels.spec import ExpertsProblem
from moec.runtime.launch.cpu_features import LEVELS, missing_features

pytestmark = pytest.mark.cpu

NUMBERS = (
    "int8", "int8-asym", "int8-g64-f32", "int4-g16", "int4-g32", "int4-g64", "int4-g128", "int4-g32-asym-f16",
    "int4-g64-asym", "int3-g32", "int3-g64", "int3-g64-asym", "int2-g16", "int2-g64", "int2-g32-asym", "nf4-g16",
    "nf4-g64", "mxfp4", "ternary", "fp8", "fp8-tensor", "fp8-block128",
)  # fmt: skip
INT8 = (
    "int8-w8a8", "int8-asym-a8", "int8-g64-a8", "int4-g64-a8", "int4-g128-asym-a8", "int3-g64-a8", "int2-g64-asym-a8",
)  # fmt: skip
ACTIVATIONS = (
    "silu", "gelu", "gelu_tanh", "relu2@2.5", "sigmoid", "swigluoai@7.0@1.702", "!relu2", "!silu", "!sigmoid",
    "!identity",
)  # fmt: skip
SMALL = {"l2_bytes": 16 << 10, "task_bytes": 16 << 10, "chunk_bytes": 16 << 10}  # so that small layers have many parts
FACTOR = {"numbers": 2, "int8": 4}
QUICK, ALL = 8, 160


def drawn(seed):
    """A problem and a kernel of this processor that takes it. Sizes are odd where the formats let them be."""
    rng = random.Random(seed)
    for _ in range(1000):
        formats, experts = rng.choice((("",), NUMBERS, NUMBERS, NUMBERS, INT8)), rng.choice((1, 2, 3, 7, 16, 33, 128))
        up = rng.choice(formats)
        steps = [rng.choice((1, 2, 16, 64, 128)) for _ in range(2)]
        shared = rng.choice((0, 0, 1, 3))
        p = ExpertsProblem(
            *(step * rng.randint(1, max(1, 400 // step)) for step in steps), experts,
            rng.randint(1, min(experts, 9)), shared, rng.choice(ACTIVATIONS),
            "float32" if rng.random() < 0.3 else "bfloat16", rng.random() < 0.3,
            has_shared_weight=shared > 0 and rng.random() < 0.5, weight_on_input=rng.random() < 0.2,
            format_up=up, format_down=up if rng.random() < 0.5 else rng.choice(formats),
        )  # fmt: skip
        able = [k for k in KERNELS if not missing_features(k.level) and k.spec().refusal(p, LEVELS[k.level]) is None]
        if able:
            return p, _turned(rng, rng.choice(able))
    raise AssertionError("no kernel takes any of these problems")


def _turned(rng, kernel):
    """The kernel, with some of its knobs away from the catalogue's in two draws of three."""
    if rng.random() < 0.33:
        return kernel
    values = {name: rng.choice(values) for name, values in knobs.knobs_of(kernel).items() if rng.random() < 0.4}
    values |= {name: value for name, value in SMALL.items() if rng.random() < 0.4}
    return dataclasses.replace(kernel, blocking=dataclasses.replace(kernel.blocking, **values))


def _routed(rng, layer, num_tokens):
    """Inputs whose tokens choose freely, all the same experts, an expert twice, or experts that are not here."""
    x, weights, experts, shared = layer.inputs(num_tokens, seed=num_tokens)
    kind, held = rng.choice(("free", "free", "same", "twice", "absent")), layer.problem.num_experts
    if kind == "same":
        experts = experts[:1].expand_as(experts)
    elif kind == "twice":
        experts = experts[:, :1].expand_as(experts)
    elif kind == "absent":
        away = torch.rand(experts.shape, generator=torch.Generator().manual_seed(num_tokens)) < 0.3
        experts = torch.where(away, held + 5, experts)
    return x, weights, experts, shared


@pytest.mark.parametrize("seed", [*range(QUICK), *(pytest.param(n, marks=pytest.mark.slow) for n in range(QUICK, ALL))])
def test_any_problem_that_a_kernel_takes_is_right(make_layer, seed):
    problem, kernel = drawn(seed)
    layer, rng = make_layer(kernel, problem), random.Random(seed)
    for num_tokens in rng.sample((1, 2, 5, 16, 31, 64, 129, 300), 4):
        given = _routed(rng, layer, num_tokens)
        int8 = problem.format_up.endswith("a8")
        if problem.format_up:
            expected, most = reference(layer, *given, int8), bound(problem)
        else:
            expected, most = layer.reference(*given), TOLERANCE[problem.dtype]
        error = layer.error(layer.run(*given), expected)
        assert error < FACTOR["int8" if int8 else "numbers"] * most, (
            f"{kernel.name} {kernel.blocking} {problem} at {num_tokens} tokens: error {error}"
        )
