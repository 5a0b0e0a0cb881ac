"""Tiny models of the 15 families that every stage is tested with: `from zoo import TINY, build, tiny, save`.

Each has three or four layers of width 32, at most 8 experts and a vocabulary of 128, random weights large enough that
greedy decoding does not settle on one token.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moec.compiler.families.catalogue import family_of

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
TINY: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 8, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": dict(ROUTED, **MLA, topk_method="group_limited_greedy"),
    "deepseek_v3": dict(ROUTED, **MLA),
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "glm4_moe": dict(ROUTED, head_dim=8),
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "head_dim": 8,
        "attention_chunk_size": 8,
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "floor_scale": 8,
        "interleave_moe_layer_step": 2,
    },
    "granitemoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "phimoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8, "rotary_dim": 4},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "head_dim": 8},
    "dots1": dict(ROUTED, layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=8),
}
# families of compiler/families, which transformers does not ship
OWN: dict[str, dict[str, Any]] = {
    "skywork_moe": {"num_experts": [8]},
    "xverse": {"num_experts": 8, "moe_top_k": 3, "intermediate_size": 24},
    "deepseek": {"n_routed_experts": 8, "num_experts_per_tok": 3},
    "grok-1": {"num_experts": 8},
}
PROMPT_LENGTHS = (5, 13, 1, 9)


def tiny(model_type: str, **over: Any) -> Any:
    """The tiny configuration of a family; `over` replaces single values."""
    own = family_of(model_type)
    if own is not None:
        settings = {k: v for k, v in BASE.items() if k != "moe_intermediate_size" or model_type == "deepseek"}
        return own.config(**{**settings, **OWN[model_type], **over})
    config = AutoConfig.for_model(model_type, **{**BASE, **TINY[model_type], **over})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def build(config: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model of this configuration with seeded weights: normal * 0.15, norm weights near 1, biases not zero."""
    own = family_of(config.model_type)
    if own is None:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    else:
        model = own.model._from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if p.dim() == 1 and "norm" in name else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + centre)
        for name, b in model.named_buffers():
            if "bias" in name and b.is_floating_point():
                b.copy_(torch.randn(b.shape, generator=generator) * 0.05)
    return model


@functools.cache
def model_of(model_type: str) -> torch.nn.Module:
    """`build(tiny(model_type))`, made once per process; do not change its weights."""
    return build(tiny(model_type))


def save(model: torch.nn.Module, path: Path, **options: Any) -> Path:
    """Writes the model as a Hugging Face directory in its published checkpoint layout and returns the directory."""
    model.save_pretrained(path, **options)  # type: ignore[operator]
    return path


def prompts(seed: int = 1) -> list[list[int]]:
    """Four random prompts of 5, 13, 1 and 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, BASE["vocab_size"], (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def greedy(model: Any, prompt: list[int], steps: int) -> tuple[list[int], torch.Tensor]:
    """What the library itself answers: greedy new tokens, and the logits [steps, vocab] that they were chosen from."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)
