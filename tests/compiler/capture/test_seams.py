import pytest
import torch
from torch import nn
from zoo import build, tiny

from moec.compiler.capture import capture
from moec.compiler.capture.masks import MaskMeaning
from moec.compiler.capture.seams import CaptureCache, Context, attention, experts, mask, seams
from moec.compiler.errors import UnsupportedModel

pytestmark = pytest.mark.null


class Layer(nn.Module):
    layer_idx = 3


def call(**options):
    qkv = [torch.zeros(1, 2, 5, 8) for _ in range(3)]
    with Context(torch.arange(5), torch.zeros(5, dtype=torch.long), None):
        return attention(Layer(), *qkv, options.pop("attention_mask", MaskMeaning()), **options)


def test_a_dry_run_finds_the_cache_shapes():
    y, _ = call(dropout=0.0, position_ids=torch.arange(5))
    assert y.shape == (1, 5, 2, 8)


def test_an_unknown_attention_argument_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match="layer 3: Layer passes head_mask to attention"):
        call(head_mask=torch.zeros(1))


def test_an_absent_argument_is_no_argument():
    call(head_mask=None)


def test_a_mask_of_its_own_is_refused():
    with pytest.raises(UnsupportedModel, match="layer 3: the attention mask is a Tensor"):
        call(attention_mask=torch.zeros(5, 5))


def test_two_attentions_in_one_layer_are_refused():
    qkv = [torch.zeros(1, 2, 5, 8) for _ in range(3)]
    with Context(torch.arange(5), torch.zeros(5, dtype=torch.long), None):
        attention(Layer(), *qkv, MaskMeaning())
        with pytest.raises(UnsupportedModel, match="two attentions"):
            attention(Layer(), *qkv, MaskMeaning())


def test_attention_outside_a_capture_is_refused():
    with pytest.raises(UnsupportedModel, match="outside a capture"):
        attention(Layer(), *[torch.zeros(1, 2, 5, 8)] * 3, MaskMeaning())


def test_a_norm_after_the_experts_is_refused():
    module = nn.Module()
    module.has_post_expert_norm = True
    with pytest.raises(UnsupportedModel, match="a norm after each expert"):
        experts(module, torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1))


def test_an_unknown_mask_is_refused():
    with pytest.raises(UnsupportedModel, match="<lambda>"):
        mask(mask_function=lambda b, h, q, k: True)


def test_the_model_is_as_before_when_a_capture_fails(monkeypatch):
    model = build(tiny("mixtral"))
    monkeypatch.setattr(type(model.model.layers[0].mlp.experts), "_apply_gate", lambda self, h: h[..., :24] + 0.1)
    with pytest.raises(UnsupportedModel, match="equals none of"):
        capture(model)
    assert model.config._experts_implementation == "eager"
    assert model.config._attn_implementation == "eager"


def test_seams_can_leave_attention_alone():
    model = build(tiny("mixtral"))
    with seams(model, attentions=False):
        assert (model.config._attn_implementation, model.config._experts_implementation) == ("eager", "moec")


def test_a_model_that_works_on_the_caches_layers_is_refused():
    cache = CaptureCache(Context(torch.arange(5), torch.zeros(5, dtype=torch.long), None))
    with pytest.raises(UnsupportedModel, match="cache's layers"):
        cache.layers[0].update_index(torch.zeros(1))
