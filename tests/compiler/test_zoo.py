"""The zoo at full width: small captures (its counts are in test_inspect_model.py)."""

import pytest
import torch

from moec.compiler.capture import capture
from moec.compiler.errors import CompileError
from moec.compiler.zoo import zoo_config

pytestmark = pytest.mark.null
# bytes that a token takes in a bfloat16 cache, all layers
KV_BYTES = {"skywork-moe": 958464, "xverse-moe-a36b": 409600, "deepseek-moe-16b": 229376, "grok-1": 262144}


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
