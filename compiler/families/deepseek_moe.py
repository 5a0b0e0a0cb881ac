"""DeepSeekMoE (version 1: 16B, and the 145B of the paper): fine-grained experts, shared experts, first layers dense.

Source: DeepSeekMoE paper, equations 9 to 11 (softmax over the routed experts, top-k, weights not renormalised, shared
experts with weight 1) and the published 16B code (logits and softmax in the model's own dtype, top-k unsorted).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from moec.compiler.families.decoder import Attention, CausalDecoder, GatedMlp, PreNormLayer, check_settings
from moec.compiler.families.experts import ExpertList

RENORM_EPS = 1e-20


class DeepseekMoeConfig(PreTrainedConfig):
    """The published config.json; intermediate_size is that of the dense layers."""

    model_type = "deepseek"

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    n_routed_experts: int = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int = 6
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    pad_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_settings(self, hidden_act="silu", scoring_func="softmax")


class DeepseekMoeBlock(nn.Module):
    """x [B,S,H] -> [B,S,H]."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.top_k, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(hidden, config.n_routed_experts, bias=False)
        names = ("gate_proj", "up_proj", "down_proj")
        self.experts = ExpertList(config.n_routed_experts, hidden, inner, names, "silu")
        self.shared_experts = GatedMlp(hidden, inner * config.n_shared_experts) if config.n_shared_experts else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        scores = F.linear(flat, self.gate.weight).softmax(dim=-1)  # [T, E]
        weights, index = torch.topk(scores, self.top_k, dim=-1, sorted=False)
        if self.renormalise and self.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + RENORM_EPS)
        y = self.experts(flat, weights, index)
        if self.shared_experts is not None:
            y = y + self.shared_experts(flat)
        return y.view(x.shape)


def _layer(config: DeepseekMoeConfig, layer_idx: int) -> nn.Module:
    sparse = layer_idx >= config.first_k_dense_replace and layer_idx % config.moe_layer_freq == 0
    ffn = DeepseekMoeBlock(config) if sparse else GatedMlp(config.hidden_size, config.intermediate_size)
    return PreNormLayer(config, Attention(config, layer_idx), "mlp", ffn)


class DeepseekMoeForCausalLM(CausalDecoder):
    """DeepSeekMoE's language model."""

    config_class = DeepseekMoeConfig
    layer = staticmethod(_layer)
