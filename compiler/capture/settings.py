"""Checks what config.json says before anything is built from it, so that an error names the key and not a tensor."""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.errors import CheckpointError

EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k")
_AT_LEAST_ONE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")


def check_raw_settings(raw: dict[str, Any], config_class: Any, origin: str) -> None:
    """Raises: CheckpointError: a string where a number belongs, a size below 1, an unknown dtype, or more experts for
    each token than there are; it names the key.
    """
    inner = raw.get("text_config")
    for settings in (raw, inner) if isinstance(inner, dict) else (raw,):
        for key, value in settings.items():
            _check_value(key, value, config_class, origin)
        _check_experts(settings, origin)
        _check_heads(settings, origin)


def _check_value(key: str, value: Any, config_class: Any, origin: str) -> None:
    default = getattr(config_class, key, None)
    numeric = key in (*EXPERTS, *_AT_LEAST_ONE) or (isinstance(default, int | float) and not isinstance(default, bool))
    if numeric and isinstance(value, str | bool | dict):
        kind = "the string " if isinstance(value, str) else ""
        raise CheckpointError(f"{origin}: {key}: expected a number, got {kind}{value!r}")
    if key in _AT_LEAST_ONE and _is_whole(value) and value < 1:
        raise CheckpointError(f"{origin}: {key}: expected at least 1, got {value!r}")
    if key in ("dtype", "torch_dtype") and value is not None:
        name = str(value).removeprefix("torch.")
        if not isinstance(getattr(torch, name, None), torch.dtype) and name != "auto":
            raise CheckpointError(f"{origin}: {key}: torch has no dtype {value!r}; expected float32, bfloat16 ..")


def _check_experts(settings: dict[str, Any], origin: str) -> None:
    for experts in EXPERTS:
        available = max(_numbers(settings.get(experts)), default=0)
        if available < 1:
            continue
        for top_k in TOP_K:
            if settings.get(top_k) == 0:
                raise CheckpointError(
                    f"{origin}: {top_k} is 0, though there are {available} experts; expected at least 1"
                )
            if max(_numbers(settings.get(top_k)), default=0) > available:
                raise CheckpointError(
                    f"{origin}: {top_k} is {settings[top_k]!r}, more than the {available} experts of {experts}"
                )
        groups = max(_numbers(settings.get("n_group")), default=0)
        if groups and available % groups:
            raise CheckpointError(f"{origin}: n_group is {groups}, which does not divide the {available} experts")


def _check_heads(settings: dict[str, Any], origin: str) -> None:
    heads, shared = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
    latent = settings.get("kv_lora_rank")  # where keys and values have no heads of their own
    if _is_whole(heads) and _is_whole(shared) and heads % shared and not latent:
        raise CheckpointError(
            f"{origin}: num_key_value_heads is {shared}, which does not divide the {heads} of num_attention_heads"
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(value: Any) -> list[int]:
    """The whole numbers of a setting, which may be one for each layer."""
    return [n for n in (value if isinstance(value, list) else [value]) if _is_whole(n)]
