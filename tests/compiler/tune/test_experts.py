"""Experts kernels in the measuring process: right ones pass, wrong ones do not, no two calls read the same."""

import dataclasses

import pytest
import torch

from moec.compiler.kernels.spec import ExpertsProblem
from moec.compiler.tune.experts import ExpertsSubject
from moec.compiler.tune.routing import UNIFORM, zipf
from moec.compiler.tune.space import experts_space

pytestmark = pytest.mark.cpu

LEVEL = "avx2"
PLAIN = ExpertsProblem(64, 32, 8, 2, 1, has_bias=True, has_shared_weight=True)
CODED = ExpertsProblem(64, 32, 8, 2, format_up="int8-a8", format_down="int8-a8")


@pytest.fixture(scope="module", params=[PLAIN, CODED], ids=["plain", "int8-a8"])
def subject(request, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("libraries"))
    return ExpertsSubject(dataclasses.asdict(request.param), LEVEL, folder), request.param


def test_a_right_kernel_passes_and_a_wrong_one_does_not(subject):
    made, problem = subject
    for tokens, routing in ((1, UNIFORM), (40, zipf(1.0))):
        made.prepare({"tokens": tokens, "routing": routing.to_json(), "seed": 3})
        candidate = made.build(experts_space(problem, LEVEL, tokens).default)
        assert made.check(candidate, 0) == "" and made.check(candidate, 7) == ""
        made.call(candidate, 5)()

        def slightly_off(*tensors, own=candidate.function):
            own(*tensors)
            tensors[-1].mul_(1.2)

        def unfinished(*tensors, own=candidate.function):
            own(*tensors)
            tensors[-1][-1, -1] = torch.nan

        wrong = dataclasses.replace(candidate, function=slightly_off)
        assert "relative error 0.2 against the reference" in made.check(wrong, 0)
        assert "part of it was not written" in made.check(dataclasses.replace(candidate, function=unfinished), 0)


def test_calls_of_two_seeds_take_other_experts(subject):
    made, problem = subject
    made.prepare({"tokens": 1, "routing": UNIFORM.to_json(), "seed": 0})
    taken = {tuple(sorted(made._given(seed).experts[0].tolist())) for seed in range(64)}
    assert len(taken) > 8 and all(min(t) >= 0 and max(t) < problem.num_experts for t in taken)
