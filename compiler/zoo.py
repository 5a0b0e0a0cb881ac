"""The zoo: nine published MoE models at full size, as the content of their config.json.

Sources: the published config.json of each model, as collected in the model facts; DeepSeekMoE-145B was not released and
its shape is from the paper (section 7), with the widths that the paper implies; APUS-xDAN-4.0 is the released
configuration, not the press text (which describes Mixtral 8x7B).
"""

from __future__ import annotations

from typing import Any

from moec.compiler.capture.configuration import parse_config
from moec.compiler.errors import CompileError

_DEEPSEEK: dict[str, Any] = {"model_type": "deepseek", "n_routed_experts": 64, "num_experts_per_tok": 6}
_XVERSE: dict[str, Any] = {"model_type": "xverse", "num_experts": 64, "moe_top_k": 6, "num_shared_experts": 2}

ZOO: dict[str, dict[str, Any]] = {
    "skywork-moe": {"model_type": "skywork_moe", "num_experts": [16]},
    "apus-xdan-4.0": {
        "model_type": "mixtral",
        "vocab_size": 64000,
        "hidden_size": 7168,
        "intermediate_size": 20480,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_theta": 1e7,
        "max_position_embeddings": 32768,
    },
    "deepseek-moe-16b": _DEEPSEEK,
    "deepseek-moe-145b": {
        **_DEEPSEEK,
        "hidden_size": 4096,
        "intermediate_size": 22528,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "n_routed_experts": 128,
        "n_shared_experts": 4,
        "num_experts_per_tok": 12,
    },
    "xverse-moe-a4.2b": _XVERSE,
    "xverse-moe-a36b": {
        **_XVERSE,
        "hidden_size": 6144,
        "intermediate_size": 4096,
        "num_hidden_layers": 50,
        "num_attention_heads": 48,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-5,
    },
    "mixtral-8x7b": {"model_type": "mixtral", "max_position_embeddings": 32768, "rope_theta": 1e6},
    "mixtral-8x22b": {
        "model_type": "mixtral",
        "vocab_size": 32768,
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "max_position_embeddings": 65536,
        "rope_theta": 1e6,
    },
    "grok-1": {"model_type": "grok-1"},
}


def zoo_config(name: str, layers: int | None = None) -> Any:
    """The bfloat16 configuration of a zoo model, of `layers` decoder layers if given.

    Raises: CompileError: no such name, or more layers than the model has.
    """
    if name not in ZOO:
        raise CompileError(f"zoo:{name}: no such model; known: {', '.join(ZOO)}")
    return parse_config({"dtype": "bfloat16", **ZOO[name]}, f"zoo:{name}", layers)
