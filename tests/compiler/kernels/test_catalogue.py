"""What holds for every kernel of the catalogue."""

import pytest
import torch

import moec.passes.ir.ops  # noqa: F401 - registers the ops
from moec.compiler.kernels.attention.cached_attention import library_cost
from moec.compiler.kernels.attention.problem import AttentionProblem
from moec.compiler.kernels.catalogue import SPECS
from moec.compiler.kernels.gate.problem import GateProblem
from moec.compiler.kernels.linear.linear import LinearProblem
from moec.compiler.kernels.linear.linear_codes import StoredLinearProblem
from moec.compiler.kernels.mlp.gated_mlp import MlpProblem
from moec.compiler.kernels.norm.row import NormProblem
from moec.compiler.kernels.rope.rope import RopeProblem
from moec.compiler.kernels.spec import ExpertsProblem
from moec.passes.ir.formats import parse_format
from moec.passes.ir.gate import GateSpec
from moec.runtime.launch.cpu_features import LEVELS

pytestmark = pytest.mark.null

PROBLEMS = {
    "moec::experts": ExpertsProblem(64, 64, 8, 2),
    "moec::gate_linear": GateProblem(GateSpec(2).encode(), 8, hidden=64),
    "moec::gate": GateProblem(GateSpec(2).encode(), 8),
    "moec::add_rms_norm": NormProblem(64),
    "moec::rms_norm": NormProblem(64),
    "moec::rope": RopeProblem(16, 16),
    "moec::cached_attention": AttentionProblem(4, 2, 16, 16),
    "moec::gated_mlp": MlpProblem(64, 32),
    "aten::linear": LinearProblem(64, 32),
}
# kernels of the same ops whose weights are stored quantised
STORED = {
    "linear-code-pairs": StoredLinearProblem(64, 32, parse_format("int4-g32"), "bfloat16"),
    "linear-codes": StoredLinearProblem(64, 32, parse_format("int8")),
    "-codes": ExpertsProblem(64, 64, 8, 2, format_up="int8", format_down="int8"),
    "-int8": ExpertsProblem(64, 64, 8, 2, format_up="int8-w8a8", format_down="int8-w8a8"),
}


def problem_of(spec):
    return next((p for part, p in STORED.items() if part in spec.name), PROBLEMS[spec.op])


def test_names_are_unique_and_ops_exist():
    names = [spec.name for spec in SPECS]
    assert len(set(names)) == len(names)
    for spec in SPECS:
        library, op = spec.op.split("::")
        assert hasattr(getattr(torch.ops, library), op), spec.op
        assert spec.level in LEVELS
    assert {spec.op for spec in SPECS} == set(PROBLEMS)


@pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])
def test_cost_grows_with_tokens_and_symbols_are_those_that_build_gives(spec):
    problem = problem_of(spec)
    assert spec.supports(problem) is None
    few, many = spec.cost(problem, 1), spec.cost(problem, 64)
    assert 0 < few.num_flops < many.num_flops and few.num_bytes <= many.num_bytes
    assert spec.workspace_bytes(problem, 0) >= 0
    if spec.op != "moec::experts":  # those take seconds to build; experts/test_catalogue.py builds them
        assert set(spec.symbols(problem)) == set(spec.build(problem))


def test_a_prompt_costs_its_causal_half_and_decode_its_context():
    problem = AttentionProblem(4, 2, 16, 16, mean_context=100)
    spec = next(s for s in SPECS if s.op == "moec::cached_attention")
    assert spec.cost(problem, 2).num_flops == 2 * 200 * 4 * 32
    assert spec.cost(problem, 1000).num_flops == 2 * 500500 * 4 * 32
    assert library_cost(problem, 2).num_bytes > spec.cost(problem, 2).num_bytes
