"""The families that transformers does not ship, from module, directory and pipeline: answers, names, refusals."""

import dataclasses
import json

import pytest
import torch
from serve import greedy_batched, greedy_single, relative_error
from zoo import OWN, build, greedy, model_of, prompts, save, tiny

from moec.compiler.capture import capture
from moec.compiler.errors import CheckpointError, UnsupportedModel
from moec.compiler.families.catalogue import family_of
from moec.passes.infra.base import PassContext
from moec.passes.pipeline import run_pipeline

pytestmark = pytest.mark.null
STEPS = 4
REL_TOLERANCE = 1e-5  # float32 sums in another order; measured at most 7e-7
ATTENTION = [f"self_attn.{p}_proj.weight" for p in "qkvo"]
NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]
SWIGLU = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
# the names of layer 1 in the published checkpoints
PUBLISHED = {
    "skywork_moe": [
        *ATTENTION, *NORMS, "block_sparse_moe.gate.weight",
        *(f"block_sparse_moe.experts.{e}.w{i}.weight" for e in range(8) for i in (1, 2, 3)),
    ],
    "xverse": [
        *ATTENTION, *NORMS, "mlp.router.weight", *(f"mlp.shared_experts.{p}" for p in SWIGLU),
        *(f"mlp.experts.{e}.{p}" for e in range(8) for p in SWIGLU),
    ],
    "deepseek": [
        *ATTENTION, *NORMS, "mlp.gate.weight", *(f"mlp.shared_experts.{p}" for p in SWIGLU),
        *(f"mlp.experts.{e}.{p}" for e in range(8) for p in SWIGLU),
    ],
    "grok-1": [
        *(f"attn.{p}_proj.weight" for p in "qkvo"), "moe_block.gate.weight",
        *(f"{when}_{what}_norm.scale" for when in ("pre", "post") for what in ("attn", "moe")),
        *(f"moe_block.experts.{e}.{p}.weight" for e in range(8) for p in ("linear", "linear_v", "linear_1")),
    ],
}  # fmt: skip


@pytest.mark.parametrize("model_type", OWN)
def test_names_are_the_published_ones(model_type):
    layer = {n.removeprefix("model.layers.1.") for n in model_of(model_type).state_dict() if ".layers.1." in n}
    assert layer == set(PUBLISHED[model_type])


@pytest.mark.parametrize("model_type", OWN)
def test_answers_before_and_after_the_passes(model_type, tmp_path):
    model = model_of(model_type)
    expected = [greedy(model, p, STEPS) for p in prompts()]
    captured = capture(save(model, tmp_path))
    whole = run_pipeline(captured.graph_module, PassContext(read=captured.read))
    compiled = dataclasses.replace(captured, graph_module=whole.graph)
    for stage in (capture(model), compiled):
        tokens, logits = greedy_batched(stage, prompts(), STEPS)
        assert tokens == [t for t, _ in expected]
        assert max(relative_error(a, b) for a, (_, b) in zip(logits, expected, strict=True)) < REL_TOLERANCE
        assert greedy_single(stage, prompts()[1], STEPS)[0] == expected[1][0]
    for name in ("lift-gate", "lift-norm", "lift-rope", "group-expert-gemms"):
        assert whole.ledgers[name].matched
        assert not whole.ledgers[name].refused


def test_nodes_do_not_grow_with_the_experts():
    few, many = (capture(build(tiny("xverse", num_experts=n))) for n in (8, 32))
    assert len(few.graph_module.graph.nodes) == len(many.graph_module.graph.nodes)


@pytest.mark.parametrize(
    ("model_type", "setting", "named"),
    [
        ("skywork_moe", {"moe_2layer_gate": True}, "moe_2layer_gate"),
        ("skywork_moe", {"moe_feature_no_mul_topk": False}, "moe_feature_no_mul_topk"),
        ("skywork_moe", {"num_experts": [8, 16]}, "num_experts"),
        ("skywork_moe", {"gate_norm": "none"}, "gate_norm"),
        ("xverse", {"num_experts": None}, "num_experts"),
        ("xverse", {"hidden_act": "gelu"}, "hidden_act"),
        ("deepseek", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("deepseek", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope"),
        ("deepseek", {"attention_bias": True}, "attention_bias"),
    ],
)
def test_settings_without_a_meaning_are_refused_by_name(model_type, setting, named, tmp_path):
    raw = {**tiny(model_type).to_dict(), **setting}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises((UnsupportedModel, CheckpointError), match=named):
        capture(tmp_path, random_weights=0)


def test_the_rotary_base_of_the_configuration_is_used(tmp_path):
    raw = {**tiny("deepseek").to_dict(), "rope_theta": 77.0}
    raw.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    captured = capture(tmp_path, random_weights=0)
    table = captured.read("computed:model.rotary_emb.inv_freq")
    torch.testing.assert_close(table, 1 / 77.0 ** (torch.arange(0, 8, 2) / 8))


def test_unknown_types():
    assert family_of("mixtral") is None
    assert family_of(None) is None
