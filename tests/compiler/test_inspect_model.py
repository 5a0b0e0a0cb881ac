"""Counts of `moec inspect MODEL --json` at full size, without a weight, against the published ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moec import cli
from moec.compiler.inspect_model import inspect_model
from moec.compiler.zoo import ZOO

pytestmark = pytest.mark.null
# billions of parameters, three decimals: total and active, and bytes of a token in a bfloat16 cache
COUNTS = {
    "skywork-moe": (146.356, 22.691, 958464),
    "apus-xdan-4.0": (113.663, 60.815, 245760),
    "deepseek-moe-16b": (16.376, 2.829, 229376),
    "deepseek-moe-145b": (144.621, 22.195, 1015808),
    "xverse-moe-a4.2b": (25.778, 4.226, 286720),
    "xverse-moe-a36b": (255.430, 36.488, 409600),
    "mixtral-8x7b": (46.703, 12.880, 131072),
    "mixtral-8x22b": (140.630, 39.161, 229376),
    "grok-1": (315.685, 83.757, 262144),
}
# TFLOPs of 4096 tokens by the DeepSeekMoE paper's rule; those models that are in the zoo
ZOO_TFLOPS = {"deepseek-moe-16b": ("training_unrounded", 74.4), "deepseek-moe-145b": ("training", 585.5)}
LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008}
MOE = {
    "model_type": "deepseek",
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 22528,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
# the others of the paper's tables 3, 4 and 6: which count, TFLOPs, config.json
TFLOPS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "DeepSeek 7B": ("training_unrounded", 183.5, {**LLAMA, "num_hidden_layers": 30, "vocab_size": 102400}),
    "LLaMA2 7B": ("training_unrounded", 187.9, {**LLAMA, "num_hidden_layers": 32, "vocab_size": 32000}),
    "GShard 137B": (
        "training_unrounded",
        572.7,
        {
            **MOE, "n_routed_experts": 16, "num_experts_per_tok": 2, "n_shared_experts": 0,
            "moe_intermediate_size": 10944,
        },
    ),
    "142B half activated": (
        "training",
        374.6,
        {
            **MOE, "n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2,
            "moe_intermediate_size": 1408,
        },
    ),
    "DeepSeek 67B": (
        "training_unrounded",
        2057.5,
        {
            **LLAMA, "hidden_size": 8192, "num_hidden_layers": 95, "num_attention_heads": 64, "vocab_size": 102400,
            "num_key_value_heads": 8, "intermediate_size": 22016,
        },
    ),
}  # fmt: skip


def inspected(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["moec", "inspect", model, "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    return dict(json.loads(capsys.readouterr().out))


def written(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", **config}))
    return str(folder)


def _unless_slow(name: str) -> Any:
    """Thousands of experts as a module each take seconds to build."""
    slow = name in ("deepseek-moe-145b", "142B half activated")
    return pytest.param(name, marks=pytest.mark.slow) if slow else name


def test_all_nine_are_there():
    assert COUNTS.keys() == ZOO.keys()


@pytest.mark.parametrize("name", [_unless_slow(n) for n in COUNTS])
def test_counts_of_the_zoo(name, monkeypatch, capsys):
    facts = inspected(f"zoo:{name}", monkeypatch, capsys)
    found = (round(facts["total_params"] / 1e9, 3), round(facts["active_params"] / 1e9, 3), facts["kv_bytes_per_token"])
    assert found == COUNTS[name]
    assert facts["gate"] and facts["weight_bytes"]["bf16"] == 2 * facts["total_params"]
    if name in ZOO_TFLOPS:
        which, published = ZOO_TFLOPS[name]
        assert round(facts["flops_per_4k_tokens"][which] / 1e12, 1) == published


@pytest.mark.parametrize("name", [_unless_slow(n) for n in TFLOPS])
def test_the_published_rule_for_flops(name, tmp_path):
    which, published, config = TFLOPS[name]
    facts = inspect_model(written(tmp_path, config))
    assert round(facts["flops_per_4k_tokens"][which] / 1e12, 1) == published


def test_a_trillion_parameters(tmp_path, monkeypatch, capsys):
    """Kimi K2: the shape of DeepSeek-V3 with 384 experts and half the heads; 1.026e12 by its published config.json."""
    config = {
        "model_type": "deepseek_v3", "vocab_size": 163840, "num_hidden_layers": 61, "num_attention_heads": 64,
        "num_key_value_heads": 64, "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.827,
    }  # fmt: skip
    facts = inspected(written(tmp_path, config), monkeypatch, capsys)
    assert round(facts["total_params"] / 1e9) == 1026
    assert round(facts["active_params"] / 1e9, 1) == 32.9
    assert facts["kv_bytes_per_token"] == 61 * (512 + 64) * 2
    assert facts["gate"]["score"] == "sigmoid"
