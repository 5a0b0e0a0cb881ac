"""A ModelShape from a Hugging Face config.json: sizes only, no code of the repository is run."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from moec.compiler.errors import UnsupportedModel
from moec.passes.placement.model_shape import Attention, DenseFfn, LayerClass, ModelShape, MoeFfn

_HIDDEN = ("hidden_size", "d_model", "n_embd", "emb_dim")
_LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
_HEADS = ("num_attention_heads", "n_heads", "n_head")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "moe_top_k", "moe_topk", "num_selected_experts", "top_k")
_WIDTH = ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size", "ffn_hidden_size")
_ONE_WIDTH = (
    "mixtral",
    "phimoe",
    "gpt_oss",
    "granitemoe",
    "olmoe",
    "minimax",
    "minimax_m2",
    "skywork",
    "xverse",
    "grok-1",
)
"""Families whose experts have the width intermediate_size, whatever else their configuration carries."""


def shape_from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The sizes that a config.json states.

    Raises:
        UnsupportedModel: a size is missing or no positive whole number; the message names the key.
    """
    c = _flattened(config)
    hidden, layers, heads = (_size(c, keys, name) for keys in (_HIDDEN, _LAYERS, _HEADS))
    vocab, model_type = _size(c, ("vocab_size",), name), str(c.get("model_type", ""))
    attention = _attention(c, hidden, heads, model_type, name)
    kinds = [_is_moe(c, i) for i in range(layers)]
    moe = _moe(c, model_type, name) if any(kinds) else None
    dense = None if all(kinds) else DenseFfn(_size(c, ("dense_intermediate_size", "intermediate_size"), name))
    norms = 4 if model_type in ("grok-1", "grok1", "gemma2") else 2
    classes = tuple(
        LayerClass(len(list(run)), attention, None if is_moe else dense, moe if is_moe else None, norms)
        for is_moe, run in groupby(kinds)
    )
    tied = bool(c.get("tie_word_embeddings", model_type in ("grok-1", "gemma2")))
    positions = int(c.get("max_position_embeddings") or c.get("max_seq_len") or 0)
    return ModelShape(name, hidden, vocab, classes, tied, model_type == "dbrx", positions)


def _flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text part of a composite configuration, with DBRX's nested attention and FFN sections lifted."""
    c = dict(config)
    if isinstance(c.get("text_config"), Mapping):
        c = c | dict(c["text_config"])
    for section in ("attn_config", "ffn_config"):
        if isinstance(c.get(section), Mapping):
            c = {**dict(c[section]), **c}
    return c


def _attention(c: dict[str, Any], hidden: int, heads: int, model_type: str, name: str) -> Attention:
    if c.get("kv_lora_rank"):
        keys = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        latent, rope, plain, value = (_size(c, (key,), name) for key in keys)
        return Attention(heads, heads, plain, int(c.get("q_lora_rank") or 0), latent, rope, value)
    kv_heads = _size(c, ("num_key_value_heads", "kv_n_heads"), name, heads)
    head_dim = _size(c, ("head_dim",), name, hidden // heads)
    norm = 0
    if model_type.startswith(("qwen3", "glm4_moe")) and c.get("use_qk_norm", True):
        norm = 2 * head_dim
    elif model_type == "olmoe":
        norm = (heads + kv_heads) * head_dim
    out_bias = hidden if model_type in ("gpt_oss", "phimoe") else 0
    biased = c.get("attention_bias") or c.get("qkv_bias") or model_type == "qwen2_moe"
    bias = (heads + 2 * kv_heads) * head_dim + out_bias if biased else 0
    return Attention(heads, kv_heads, head_dim, qk_norm_params=norm, bias_params=bias, window=_window(c))


def _window(c: dict[str, Any]) -> int:
    """The sliding window where every layer has it; alternating windows count as full attention."""
    if c.get("layer_types") or not c.get("use_sliding_window", True):
        return 0
    return int(c.get("sliding_window") or 0)


def _moe(c: dict[str, Any], model_type: str, name: str) -> MoeFfn:
    num_experts = _size(c, _EXPERTS, name)
    width = _size(c, ("intermediate_size",) if model_type in _ONE_WIDTH else _WIDTH, name)
    top_k = _size(c, _TOP_K, name, 2 if "skywork" in model_type else None)
    if top_k > num_experts:
        raise UnsupportedModel(
            f"{name}: config.json chooses {top_k} of {num_experts} experts; top-k must not exceed the experts"
        )
    shared = c.get("shared_expert_intermediate_size") or c.get("shared_intermediate_size")
    if not shared:
        shared = width * int(
            c.get("n_shared_experts") or c.get("num_shared_experts") or c.get("num_shared_expert") or 0
        )
    oss = model_type == "gpt_oss"
    hidden = _size(c, _HIDDEN, name)
    router_bias = (
        oss or c.get("scoring_func") == "sigmoid" or model_type in ("deepseek_v3", "kimi_k2", "glm4_moe", "minimax_m2")
    )
    return MoeFfn(
        num_experts,
        top_k,
        width,
        int(shared),
        shared_gate=model_type == "qwen2_moe",
        router_bias=bool(router_bias),
        expert_bias_params=2 * width + hidden if oss else 0,
    )


def _is_moe(c: dict[str, Any], layer: int) -> bool:
    if not any(c.get(key) for key in _EXPERTS):
        return False
    if layer < int(c.get("first_k_dense_replace") or 0) or layer in (c.get("mlp_only_layers") or ()):
        return False
    step = int(c.get("decoder_sparse_step") or c.get("interleave_moe_layer_step") or 1)
    frequency = c.get("moe_layer_freq") or 1
    if isinstance(frequency, list):
        return bool(frequency[layer])
    return (layer + 1) % step == 0 and layer % int(frequency) == 0


def _size(c: dict[str, Any], keys: tuple[str, ...], name: str, default: int | None = None) -> int:
    value = next((c[key] for key in keys if c.get(key) is not None), default)
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None:
        raise UnsupportedModel(f"{name}: config.json has no {' or '.join(keys)}; a plan needs it")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedModel(f"{name}: {keys[0]} in config.json is {value!r}; expected a whole number of at least 1")
    return value
