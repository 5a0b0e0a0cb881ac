"""Whole models of transformers under torch.compile(backend="moec") give eager's logits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import BASE, TINY

from moec.compiler.dynamo import backend


@pytest.mark.cpu
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_model_equals_eager(family):
    torch.compiler.reset()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**BASE, **TINY[family], "num_hidden_layers": 1})
    model = AutoModelForCausalLM.from_config(config).eval()
    fast = torch.compile(model, backend="moec", options={"verify": "off"})
    with torch.no_grad():
        for tokens in (5, 8):
            ids = torch.randint(1, 100, (1, tokens))
            expected = model(ids, use_cache=False).logits
            # float32: sums in another order, through one layer
            torch.testing.assert_close(fast(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    compiled = [r for r in backend.records if not r.reason]
    assert sum(r.experts for r in compiled) == 1, backend.records
    torch.compiler.reset()
