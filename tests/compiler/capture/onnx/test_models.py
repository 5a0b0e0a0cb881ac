"""Whole models: a decoder with keys and values of earlier tokens, and transformers' own through torch's exporter."""

from __future__ import annotations

import onnx_files as files
import pytest
import torch
from moe_blocks import H, MixtralLoop
from torch import nn

import moec

TOLERANCE = 1e-5  # relative, float32: sums in another order; measured 1e-7 to 3e-7
HEADS, VOCABULARY = 2, 50


class Decoder(nn.Module):
    """One layer of attention over a past, and a loop over experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, H), nn.Linear(H, VOCABULARY)
        self.q, self.k, self.v, self.o = (nn.Linear(H, H) for _ in range(4))
        self.moe = MixtralLoop(E=4)

    def forward(self, input_ids, attention_mask, past_key, past_value):
        x = self.embed(input_ids)
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, HEADS, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
        scores = q @ k.transpose(2, 3) / (H // HEADS) ** 0.5 + (1.0 - attention_mask[:, None, None].float()) * -1e4
        x = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, H))
        return self.head(x + self.moe(x)[0]), k, v


def inputs(batch, new, past):
    pasts = (torch.randn(batch, HEADS, past, H // HEADS) for _ in range(2))
    return torch.randint(0, VOCABULARY, (batch, new)), torch.ones(batch, past + new, dtype=torch.int64), *pasts


def test_a_decoder_with_a_past(tmp_path):
    """The mask's length is the sum of two open dimensions; engines take one token, and an empty past."""
    torch.manual_seed(0)
    past = {0: "batch_size", 2: "past_sequence_length"}
    axes = {
        "input_ids": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "past_sequence_length + sequence_length"},
        "past_key_values.0.key": past,
        "past_key_values.0.value": past,
    }
    path = str(tmp_path / "m.onnx")
    names = {"input_names": list(axes), "output_names": ["logits", "present.0.key", "present.0.value"]}
    torch.onnx.export(Decoder().eval(), inputs(2, 3, 4), path, dynamo=False, dynamic_axes=axes, **names)
    engine = moec.compile(path)
    for sizes in ((1, 1, 1), (2, 3, 4), (3, 2, 7), (1, 5, 0)):
        given = inputs(*sizes)
        for found, expected in zip(engine(*given), files.run(path, *given), strict=True):
            assert files.relative_error(found, expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_transformers_models_of_today(tmp_path, family):
    """What torch's exporter makes of transformers' models (experts as batched products) becomes an engine."""
    from zoo import model_of

    torch.manual_seed(0)
    model = model_of(family).eval()
    model.set_experts_implementation("batched_mm")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids, use_cache=False).logits

    path = tmp_path / "m.onnx"
    tokens = torch.randint(0, model.config.vocab_size, (2, 7))
    axes = ({0: "batch", 1: "sequence"},)
    torch.onnx.export(Logits(), (tokens,), path, dynamo=True, dynamic_shapes=axes, verbose=False, external_data=True)
    engine = moec.compile(path)
    assert engine.inspect()["moe_layers"]
    for shape in ((1, 1), (2, 7), (3, 11)):
        given = torch.randint(0, model.config.vocab_size, shape)
        assert files.relative_error(engine(given), files.run(path, given)[0]) <= 1e-4
