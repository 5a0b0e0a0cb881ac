"""XVERSE-MoE (A4.2B and A36B): router in float32, renormalised weights, shared experts fused into one ungated network.

Source: the published modeling code as recorded in the model facts: softmax over all experts, top-k, division by the sum
plus 1e-6, rounding to the model's dtype; rotary embedding in float32. (A serving port leaves the renormalisation out.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from moec.compiler.errors import UnsupportedModel
from moec.compiler.families.decoder import Attention, CausalDecoder, GatedMlp, PreNormLayer, check_settings
from moec.compiler.families.experts import ExpertList

RENORM_EPS = 1e-6


class XverseMoeConfig(PreTrainedConfig):
    """The published config.json; intermediate_size is one expert's, moe_top_k how many a token uses."""

    model_type = "xverse"

    vocab_size: int = 100534
    hidden_size: int = 2560
    intermediate_size: int = 1728
    num_hidden_layers: int = 28
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 500000.0
    num_experts: int | None = 64
    moe_top_k: int = 6
    num_shared_experts: int | None = 2
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 3
    pad_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.num_experts is None:
            raise UnsupportedModel("xverse: no num_experts in config.json; this is a dense XVERSE, not a MoE model")
        super().__post_init__(**kwargs)
        check_settings(self, hidden_act="silu")


class XverseMoeBlock(nn.Module):
    """x [B,S,H] -> [B,S,H]."""

    def __init__(self, config: XverseMoeConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        assert config.num_experts is not None
        self.top_k = config.moe_top_k
        self.router = nn.Linear(hidden, config.num_experts, bias=False, dtype=torch.float32)
        names = ("gate_proj", "up_proj", "down_proj")
        self.experts = ExpertList(config.num_experts, hidden, inner, names, "silu")
        self.shared_experts = GatedMlp(hidden, inner * config.num_shared_experts) if config.num_shared_experts else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        scores = F.softmax(self.router(flat.float()), dim=1)  # [T, E]
        weights, index = torch.topk(scores, self.top_k, dim=-1)
        weights = weights / (weights.sum(-1, keepdim=True) + RENORM_EPS)
        y = self.experts(flat, weights.to(x.dtype), index)
        if self.shared_experts is not None:
            y = y + self.shared_experts(flat)
        return y.view(x.shape)


def _layer(config: XverseMoeConfig, layer_idx: int) -> nn.Module:
    attention = Attention(config, layer_idx, rope_dtype=torch.float32)
    return PreNormLayer(config, attention, "mlp", XverseMoeBlock(config))


class XverseMoeForCausalLM(CausalDecoder):
    """XVERSE-MoE's language model."""

    config_class = XverseMoeConfig
    layer = staticmethod(_layer)
