"""The zoo at full size: counts against the published ones, and small captures."""

import pytest
import torch

from moec.compiler.capture import capture
from moec.compiler.capture.skeleton import build_skeleton
from moec.compiler.errors import CompileError
from moec.compiler.zoo import ZOO, zoo_config

pytestmark = pytest.mark.null
# billions of parameters, three decimals: the published counts where those have them (145B: published as 144.6)
TOTAL = {
    "skywork-moe": 146.356,
    "apus-xdan-4.0": 113.663,
    "deepseek-moe-16b": 16.376,
    "deepseek-moe-145b": 144.621,
    "xverse-moe-a4.2b": 25.778,
    "xverse-moe-a36b": 255.430,
    "mixtral-8x7b": 46.703,
    "mixtral-8x22b": 140.630,
    "grok-1": 315.685,
}
# bytes that a token takes in a bfloat16 cache, all layers
KV_BYTES = {"skywork-moe": 958464, "xverse-moe-a36b": 409600, "deepseek-moe-16b": 229376, "grok-1": 262144}


def count(name: str, layers: int) -> int:
    return sum(p.numel() for p in build_skeleton(zoo_config(name, layers), torch.bfloat16).model.parameters())


def test_all_nine_are_there():
    assert TOTAL.keys() == ZOO.keys()


@pytest.mark.parametrize("name", TOTAL)
def test_parameter_counts(name):
    """All layers after the first are alike, so two small builds give the whole count."""
    first, second = count(name, 1), count(name, 2)
    layers = zoo_config(name).num_hidden_layers
    assert round((first + (layers - 1) * (second - first)) / 1e9, 3) == TOTAL[name]


@pytest.mark.parametrize("name", KV_BYTES)
def test_captures_at_full_width_without_weights(name):
    captured = capture(f"zoo:{name}", layers=2)
    layers = zoo_config(name).num_hidden_layers
    assert captured.info.kv_bytes_per_token * layers == KV_BYTES[name] * 2
    assert captured.info.dtype == torch.bfloat16
    assert captured.moe_layers == ((1,) if name.startswith("deepseek") else (0, 1))


def test_unknown_name():
    with pytest.raises(CompileError, match=r"zoo:gpt-5: no such model; known: skywork-moe, .*grok-1"):
        capture("zoo:gpt-5")


def test_more_layers_than_there_are():
    with pytest.raises(CompileError, match="expected 1 to 32"):
        capture("zoo:mixtral-8x7b", layers=33)
