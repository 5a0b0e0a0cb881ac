"""Skywork-MoE: Mixtral's layout, with router logits divided by their standard deviation before the softmax.

Source: Skywork-MoE technical report, equations 2 and 6, and the gating code of the same group's MoE++: the unbiased
standard deviation (N - 1), no subtraction of the mean (softmax does not see it), router in float32. The serving fork
that the group published skips the normalisation by mistake; gate_norm="fork" does as it does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from moec.compiler.errors import UnsupportedModel
from moec.compiler.families.decoder import Attention, CausalDecoder, PreNormLayer, check_settings
from moec.compiler.families.experts import ExpertList


class SkyworkMoeConfig(PreTrainedConfig):
    """The published config.json, whose num_experts is a list, and gate_norm: "paper" or "fork"."""

    model_type = "skywork_moe"

    vocab_size: int = 65532
    hidden_size: int = 4608
    intermediate_size: int = 12288
    num_hidden_layers: int = 52
    num_attention_heads: int = 36
    num_key_value_heads: int = 36
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    num_experts: int | list[int] = 16
    num_experts_per_tok: int = 2
    moe_use_logits_norm: bool = True
    moe_gate_norm_std: float = 1.0
    moe_2layer_gate: bool = False
    moe_feature_no_mul_topk: bool = True
    moe_use_skywork_gating: bool = False
    moe_expert_interval: int = 1
    gate_norm: str = "paper"
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if isinstance(self.num_experts, list):
            if len(self.num_experts) != 1:
                raise UnsupportedModel(f"skywork_moe: num_experts is {self.num_experts}; one number is known")
            self.num_experts = self.num_experts[0]
        if self.gate_norm not in ("paper", "fork"):
            raise UnsupportedModel(f"skywork_moe: gate_norm is {self.gate_norm!r}; expected 'paper' or 'fork'")
        super().__post_init__(**kwargs)
        check_settings(
            self,
            hidden_act="silu",
            moe_2layer_gate=False,
            moe_feature_no_mul_topk=True,
            moe_use_skywork_gating=False,
            moe_expert_interval=1,
        )


class SkyworkMoeBlock(nn.Module):
    """x [B,S,H] -> [B,S,H]."""

    def __init__(self, config: SkyworkMoeConfig) -> None:
        super().__init__()
        assert isinstance(config.num_experts, int)
        self.top_k = config.num_experts_per_tok
        normalise = config.moe_use_logits_norm and config.gate_norm == "paper"
        self.norm_std = config.moe_gate_norm_std if normalise else None
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = ExpertList(
            config.num_experts, config.hidden_size, config.intermediate_size, ("w1", "w3", "w2"), "silu"
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        logits = F.linear(flat.float(), self.gate.weight.float())  # [T, E]
        if self.norm_std is not None:
            logits = logits / (logits.std(dim=1, keepdim=True) / self.norm_std)
        weights, index = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.experts(flat, weights.to(x.dtype), index).view(x.shape)


def _layer(config: SkyworkMoeConfig, layer_idx: int) -> nn.Module:
    return PreNormLayer(config, Attention(config, layer_idx), "block_sparse_moe", SkyworkMoeBlock(config))


class SkyworkMoeForCausalLM(CausalDecoder):
    """Skywork-MoE's language model."""

    config_class = SkyworkMoeConfig
    layer = staticmethod(_layer)
