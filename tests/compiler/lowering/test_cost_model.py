"""What the predicted times decide, for targets with and without AMX."""

import pytest
import torch
from torch import nn

from moec.compiler.kernels.attention import cached_attention as attention
from moec.compiler.kernels.attention.problem import AttentionProblem
from moec.compiler.kernels.experts import call
from moec.compiler.kernels.experts.catalogue import SPECS
from moec.compiler.kernels.spec import Cost, ExpertsProblem
from moec.compiler.lowering import cost_model
from moec.compiler.lowering.bind_dense import linear_site
from moec.runtime.launch.cpu_features import LEVELS

SHAPES = {
    "deepseek-moe-16b": (2048, 1408, 64, 6, 2),
    "qwen3-30b-a3b": (2048, 768, 128, 8, 0),
    "mixtral-8x7b": (4096, 14336, 8, 2, 0),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("level", LEVELS)
def test_the_kernel_for_a_target_is_chosen_over_the_library_s_experts(shape, level):
    """It is faster than transformers' grouped_mm in every cell of benchmarks/results."""
    problem = ExpertsProblem(*SHAPES[shape], "silu", "bfloat16")
    spec = next(s for s in SPECS if s.refusal(problem, LEVELS[level]) is None)
    assert spec.level == level
    for tokens in cost_model.TOKEN_GRID:
        cost = call.cost(problem, tokens)
        used = problem.num_experts * (1 - (1 - problem.top_k / problem.num_experts) ** tokens) + problem.num_shared
        library = cost_model.library_experts_us(cost, 12 + 6 * used, "bfloat16", level)
        kernel = cost_model.kernel_us(cost, level, spec.arithmetic or "widened", level)
        assert kernel < library, (level, tokens)


def test_a_library_without_amx_is_not_taken_for_one_with_it():
    """2048 rows of a linear layer: the ratio to the best vectors is 1.1 without AMX, 5 with it."""
    cost = Cost(2 * 2048 * 2048, 2 * 2048 * 2048 * 2048)
    ratios = {
        level: cost_model.kernel_us(cost, "avx512_bf16", "bfloat16", level)
        / cost_model.library_us(cost, 1, "bfloat16", level)
        for level in ("avx512_bf16", "amx_bf16")
    }
    assert ratios["avx512_bf16"] < 1.3 and ratios["amx_bf16"] > 3


@pytest.mark.parametrize("level", LEVELS)
def test_a_target_knows_a_rate_for_all_that_runs_on_it(level):
    rates = cost_model.MACHINES[level].flops_per_s
    usable = [other for other, needs in LEVELS.items() if needs <= LEVELS[level]]
    assert {(one, kind) for one in usable for kind in ("float32", "widened", "codes")} <= set(rates)
    assert {(one, kind) for one in ("library", "library attention") for kind in ("float32", "bfloat16")} <= set(rates)
    assert level != "avx512_bf16" or (level, "code_pairs") in rates


@pytest.mark.parametrize("level", ["avx2", "avx512f", "avx512_bf16"])
@pytest.mark.parametrize("heads", [(32, 8), (16, 16), (64, 4)])
def test_without_amx_attention_is_the_kernel_s(level, heads):
    """It is faster at every length: benchmarks/bench_small_kernels.py --ops attention."""
    problem = AttentionProblem(*heads, 128, 128)
    spec = next(s for s in attention.SPECS if s.level == level)
    for tokens in cost_model.TOKEN_GRID:
        kernel = cost_model.kernel_us(spec.cost(problem, tokens), level, "widened", level)
        library = cost_model.library_attention_us(attention.library_cost(problem, tokens), 8, "bfloat16", level)
        assert kernel < library, tokens


@pytest.mark.parametrize("level", [None, *LEVELS])
def test_bfloat16_is_prepacked_only_where_onednn_can(level):
    """Without AVX-512 oneDNN refuses to pack bfloat16 weights: the engine would not load."""
    with torch.device("meta"):
        layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
        program = torch.export.export(layer, (torch.empty(4, 64, dtype=torch.bfloat16),))
    module = program.module()
    node = next(n for n in module.graph.nodes if n.target is torch.ops.aten.linear.default)
    site = linear_site(node, level)
    packed = next(c for c in site.candidates if c.name == "onednn-prepacked-linear")
    assert (packed.refused is not None) == (level in (None, "avx2"))
