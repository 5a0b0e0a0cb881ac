"""The space of the experts kernels: canonical first, nothing twice, one weight layout, a name for each."""

import dataclasses
import random

import pytest

from moec.compiler.errors import CompileError
from moec.compiler.kernels.experts import call, knobs
from moec.compiler.kernels.experts.catalogue import AMX_BF16, KERNELS
from moec.compiler.kernels.spec import ExpertsProblem
from moec.compiler.tune.errors import TuneError
from moec.compiler.tune.record import config_hash
from moec.compiler.tune.space import experts_space

LAYER = ExpertsProblem(2048, 1408, 64, 6, 2)
CODED = dataclasses.replace(LAYER, format_up="int4", format_down="int4")


@pytest.mark.parametrize("problem", [LAYER, CODED, dataclasses.replace(LAYER, dtype="float32")], ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_the_default_is_what_the_catalogue_has(problem, tokens):
    space = experts_space(problem, "amx_bf16", tokens)
    kernel = knobs.configured(space.default)
    assert kernel in KERNELS and kernel.variant == ""
    assert space.holds(space.default) and space.rank(space.default)[0] == 0
    assert all(space.holds(c) for c in space.beginnings)
    rng = random.Random(0)
    for config in (space.sample(rng) for _ in range(20)):
        made = knobs.configured(config)
        assert made.spec().pack(problem) == call.weight_layout(problem), "all configurations read the same weights"
        assert made.spec().supports(problem) is None


def test_values_that_come_to_the_same_are_one_candidate():
    """At one token rows need no cutting: step_rows, even_rows and l2_bytes have one value each."""
    one, many = (experts_space(LAYER, "amx_bf16", t).branches[0].values for t in (1, 2048))
    assert [len(one[n]) for n in ("step_rows", "even_rows", "l2_bytes")] == [1, 1, 1]
    assert many["step_rows"] == (16, 32, 48) and many["even_rows"] == (False, True) and len(many["l2_bytes"]) > 2
    assert one["threads"] == many["threads"] == (0,), "half of the processor is not worth a try for so large a layer"


def test_a_kernel_without_tiles_is_tried_where_an_expert_has_few_rows():
    names = [[b.default["kernel"] for b in experts_space(LAYER, "amx_bf16", t).branches] for t in (1, 2048)]
    assert names == [["experts-amx-bf16", "experts-avx512-bf16"], ["experts-amx-bf16"]]


def test_symbols_tell_configurations_apart():
    configs = [knobs.config_of(AMX_BF16) | {"task_bytes": size} for size in (1 << 20, 2 << 20, 4 << 20)]
    symbols = [knobs.configured(c).symbol(LAYER) for c in configs]
    assert len(set(symbols)) == 3 and symbols[0] == call.symbol(LAYER)
    assert all(s.startswith(call.symbol(LAYER)) for s in symbols)


def test_all_counts_to_size_without_repeats():
    space = experts_space(ExpertsProblem(64, 64, 8, 2), "avx2", 1)
    every = [config_hash(c) for c in space.all()]
    assert len(every) == len(set(every)) == space.size


def test_what_the_space_does_not_have():
    with pytest.raises(CompileError, match="experts-amx-bf16 cannot have task_bytes=7"):
        knobs.configured(knobs.config_of(AMX_BF16) | {"task_bytes": 7})
    with pytest.raises(CompileError, match="kernel 'none' is unknown"):
        knobs.configured({"kernel": "none"})
    with pytest.raises(TuneError, match="no experts kernel of avx2 does"):
        experts_space(dataclasses.replace(LAYER, act="no-such-act"), "avx2", 1)
