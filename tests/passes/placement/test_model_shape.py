"""Counts of the zoo models against the published ones."""

from __future__ import annotations

import pytest

from moec.passes.placement.zoo import ZOO, zoo_shape

PUBLISHED = {  # billions, total and active, as the models' own papers, cards or checkpoint indices state or imply them
    "skywork-moe": (146.356, 22.691),
    "apus-xdan-4.0": (113.663, 60.815),
    "deepseek-moe-16b": (16.376, 2.829),
    "deepseek-moe-145b": (144.6, 22.2),
    "xverse-moe-a4.2b": (25.778, 4.226),
    "xverse-moe-a36b": (255.430, 36.488),
    "mixtral-8x7b": (46.703, 12.880),
    "mixtral-8x22b": (140.630, 39.161),
    "grok-1": (315.68, 83.76),
}
KV_BYTES = {"skywork-moe": 958464, "xverse-moe-a36b": 409600, "mixtral-8x7b": 131072, "grok-1": 262144}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    shape = zoo_shape(name)
    total, active = PUBLISHED[name]
    digits = 1 if name == "deepseek-moe-145b" else 2 if name == "grok-1" else 3
    assert round(shape.total_params() / 1e9, digits) == total
    assert round(shape.active_params() / 1e9, digits) == active


def test_checkpoint_bytes_of_apus():
    """Its safetensors index states total_size 227,325,966,336 bytes of bf16."""
    assert 2 * zoo_shape("apus-xdan-4.0").total_params() == 227_325_966_336


@pytest.mark.parametrize("name", KV_BYTES)
def test_cache_bytes_per_token(name):
    assert zoo_shape(name).kv_bytes_per_token() == KV_BYTES[name]


def test_nine_models():
    assert len(ZOO) == 9
    assert zoo_shape("gpt-5") is None
