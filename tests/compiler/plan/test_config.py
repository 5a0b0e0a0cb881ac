"""Sizes from config.json of many families, against the published parameter counts."""

from __future__ import annotations

import pytest

from moec.compiler.errors import UnsupportedModel
from moec.compiler.plan.config import shape_from_config

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
CASES = {  # name: (config, total billions, active billions; None where not published to this precision)
    "mixtral": (MIXTRAL, 46.703, 12.880),
    "skywork": (
        {
            "model_type": "skywork",
            "hidden_size": 4608,
            "num_hidden_layers": 52,
            "num_attention_heads": 36,
            "num_key_value_heads": 36,
            "intermediate_size": 12288,
            "num_experts": [16],
            "vocab_size": 65532,
        },
        146.356,
        22.691,
    ),
    "xverse-a36b": (
        {
            "model_type": "xverse",
            "hidden_size": 6144,
            "num_hidden_layers": 50,
            "num_attention_heads": 48,
            "num_key_value_heads": 16,
            "intermediate_size": 4096,
            "num_experts": 64,
            "num_shared_experts": 2,
            "num_experts_per_tok": 6,
            "vocab_size": 100534,
        },
        255.430,
        36.488,
    ),
    "deepseek-moe-16b": (
        {
            "model_type": "deepseek",
            "hidden_size": 2048,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "vocab_size": 102400,
        },
        16.376,
        2.829,
    ),
    "deepseek-v3": (
        {
            "model_type": "deepseek_v3",
            "hidden_size": 7168,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "vocab_size": 129280,
        },
        671.03,
        37.55,
    ),
    "qwen3-30b-a3b": (
        {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
        },
        30.53,
        3.35,
    ),
    "qwen1.5-moe": (
        {
            "model_type": "qwen2_moe",
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "vocab_size": 151936,
        },
        14.3,
        2.7,
    ),
    "dbrx": (
        {
            "model_type": "dbrx",
            "d_model": 6144,
            "n_layers": 40,
            "n_heads": 48,
            "attn_config": {"kv_n_heads": 8, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
            "vocab_size": 100352,
        },
        131.6,
        36.5,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_published_counts(name):
    config, total, active = CASES[name]
    shape = shape_from_config(config, name)
    digits = [len(str(v).split(".")[1]) for v in (total, active)]
    assert round(shape.total_params() / 1e9, digits[0]) == total
    assert round(shape.active_params() / 1e9, digits[1]) == active


def test_layer_kinds():
    config = MIXTRAL | {"mlp_only_layers": [0, 5], "moe_intermediate_size": 1024}
    shape = shape_from_config(config, "m")
    assert [(c.count, c.moe is not None) for c in shape.layers] == [(1, False), (4, True), (1, False), (26, True)]
    every_second = shape_from_config(MIXTRAL | {"decoder_sparse_step": 2}, "m")
    assert [i for i in range(4) if every_second.layer_class(i).moe] == [1, 3]


def test_composite_configuration():
    wrapped = {"model_type": "vlm", "text_config": MIXTRAL}
    assert shape_from_config(wrapped, "m").total_params() == shape_from_config(MIXTRAL, "m").total_params()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "config.json has no hidden_size or d_model"),
        ({"vocab_size": -1}, "vocab_size in config.json is -1"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers in config.json is 'many'"),
        ({"num_experts_per_tok": 9}, "chooses 9 of 8 experts"),
        ({"num_local_experts": []}, None),
    ],
)
def test_bad_configurations(change, message):
    if message is None:  # no experts: a dense model, which reading accepts and planning refuses
        assert shape_from_config(MIXTRAL | change, "m").layers[0].moe is None
        return
    with pytest.raises(UnsupportedModel) as error:
        shape_from_config(MIXTRAL | change, "m")
    assert message in str(error.value)
