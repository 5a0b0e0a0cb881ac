"""Grok-1: sandwich norms, GeGLU experts, capped attention logits, multipliers on embedding and output.

Source: xai-org/grok-1, model.py and run.py: router softmax in float32 over all experts, top-2, weights not
renormalised; an expert is linear_1(gelu(linear(x)) * linear_v(x)) with the tanh form of GELU; norms in float32. Names
are those of the PyTorch ports of the checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from moec.compiler.families.decoder import Attention, CausalDecoder, RmsNorm, check_settings
from moec.compiler.families.experts import ExpertList


class Grok1Config(PreTrainedConfig):
    """The ports' config.json. max_attn_value: the cap of attention scores, which attn_output_multiplier scales."""

    model_type = "grok-1"

    vocab_size: int = 131072
    hidden_size: int = 6144
    intermediate_size: int = 32768
    num_hidden_layers: int = 64
    num_attention_heads: int = 48
    num_key_value_heads: int = 8
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    num_experts: int = 8
    num_experts_per_tok: int = 2
    attn_output_multiplier: float = 0.08838834764831845
    max_attn_value: float = 30.0
    embedding_multiplier_scale: float = 78.38367176906169
    output_multiplier_scale: float = 0.5773502691896257
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_settings(self)


class Grok1MoeBlock(nn.Module):
    """x [B,S,H] -> [B,S,H]."""

    def __init__(self, config: Grok1Config) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        names = ("linear", "linear_v", "linear_1")
        self.experts = ExpertList(config.num_experts, config.hidden_size, config.intermediate_size, names, "gelu_tanh")

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        scores = F.linear(flat.float(), self.gate.weight.float()).softmax(dim=-1)  # [T, E]
        weights, index = torch.topk(scores, self.top_k, dim=-1)
        return self.experts(flat, weights.to(x.dtype), index).view(x.shape)


class Grok1Layer(nn.Module):
    """x + norm(attention(norm(x))), then x + norm(experts(norm(x)))."""

    def __init__(self, config: Grok1Config, layer_idx: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer_idx, scale=config.attn_output_multiplier, softcap=config.max_attn_value)
        self.moe_block = Grok1MoeBlock(config)
        self.pre_attn_norm, self.post_attn_norm, self.pre_moe_norm, self.post_moe_norm = (
            RmsNorm(config.hidden_size, config.rms_norm_eps, "scale") for _ in range(4)
        )

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Any, cache: Any) -> Tensor:
        x = x + self.post_attn_norm(self.attn(self.pre_attn_norm(x), rotary, mask, cache))
        return x + self.post_moe_norm(self.moe_block(self.pre_moe_norm(x)))


class Grok1ForCausalLM(CausalDecoder):
    """Grok-1's language model; its norms call their weight `scale`."""

    config_class = Grok1Config
    layer = Grok1Layer
    norm_name = "scale"

    def __init__(self, config: Grok1Config) -> None:
        super().__init__(config, config.embedding_multiplier_scale, config.output_multiplier_scale)
