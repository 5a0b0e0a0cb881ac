"""The families of this folder by model_type."""

from __future__ import annotations

import dataclasses
from typing import Any

from moec.compiler.families.deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM
from moec.compiler.families.grok1 import Grok1Config, Grok1ForCausalLM
from moec.compiler.families.skywork_moe import SkyworkMoeConfig, SkyworkMoeForCausalLM
from moec.compiler.families.xverse_moe import XverseMoeConfig, XverseMoeForCausalLM


@dataclasses.dataclass(frozen=True)
class Family:
    """model_types: what checkpoints of this family say in config.json."""

    model_types: tuple[str, ...]
    config: Any
    model: Any


FAMILIES = (
    Family(("skywork_moe", "skywork"), SkyworkMoeConfig, SkyworkMoeForCausalLM),
    Family(("xverse", "xverse_moe"), XverseMoeConfig, XverseMoeForCausalLM),
    Family(("deepseek",), DeepseekMoeConfig, DeepseekMoeForCausalLM),
    Family(("grok-1", "grok1"), Grok1Config, Grok1ForCausalLM),
)


def family_of(model_type: str | None) -> Family | None:
    """The family that a model_type names, or None."""
    return next((f for f in FAMILIES if model_type in f.model_types), None)


def family_of_model(model: Any) -> Family | None:
    """The family that a model in memory is of, or None."""
    return next((f for f in FAMILIES if isinstance(model, f.model)), None)
