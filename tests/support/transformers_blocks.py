"""The MoE blocks of the transformers library, built tiny from their configuration classes: nobody wrote them for us."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import typing
from typing import Any

import torch
import transformers.models
from torch import nn

H, ROWS = 32, (2, 3)
NAME = re.compile(r"(MoE|Moe|MOE|MoeBlock|MoEBlock|SparseMLP|DbrxFFN|GptOssMLP|OpenAIPrivacyFilterMLP)$")
SIZES: dict[str, Any] = {
    "hidden_size": H,
    "d_model": H,
    "n_embd": H,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "moe_ffn_hidden_size": 24,
    "expert_ffn_hidden_size": 24,
    "ffn_hidden_size": 48,
    "intermediate_size_mlp": 48,
    "moe_shared_expert_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "share_expert_dim": 24,
    "moe_latent_size": 16,
    "d_ff": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_hidden_layers": 4,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_routed_experts": 8,
    "zero_expert_num": 2,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "moe_hidden_size": 16,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "vocab_size": 64,
    "expert_capacity": 64,
}
# None by default in some configurations
MAYBE = ("n_group", "topk_group", "num_experts_per_tok", "n_routed_experts", "num_local_experts", "n_shared_experts")
ARGUMENTS = {"layer_idx": 1, "layer_id": 1, "intermediate_size": 24, "hidden_size": H, "ffn_dim": 48, "is_sparse": True}


def found() -> dict[str, type[nn.Module]]:
    """Classes by name whose name says that they are a whole block, from every model that the library has."""
    classes: dict[str, type[nn.Module]] = {}
    for entry in pkgutil.iter_modules(transformers.models.__path__):
        try:
            module = importlib.import_module(f"transformers.models.{entry.name}.modeling_{entry.name}")
        except ImportError:
            continue
        for name, cls in vars(module).items():
            mine = inspect.isclass(cls) and cls.__module__ == module.__name__
            if mine and issubclass(cls, nn.Module) and NAME.search(name):
                classes[name] = cls
    return classes


def built(cls: type[nn.Module]) -> nn.Module:
    """A tiny block with seeded weights. Raises: whatever its constructor raises."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    errors = []
    for config_class in _configs(cls):
        try:
            config = small(config_class())
            given = [config if p.name == "config" else ARGUMENTS.get(p.name, 24) for p in parameters if _needed(p)]
            torch.manual_seed(5)
            block = cls(*given)
            break
        except Exception as error:  # a configuration of another part of the model
            errors.append(error)
    else:
        raise errors[0]
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.3 if tensor.dim() > 1 and "bias" not in name else 0.05)
            if "norm" in name:
                tensor.data += 1
    return block.eval()


def _needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD


def _configs(cls: type[nn.Module]) -> list[Any]:
    """Configuration classes to try: the annotated one, then those that the module names, of the text part first."""
    module = importlib.import_module(cls.__module__)
    hints = typing.get_type_hints(cls.__init__, vars(module))
    named = [c for n, c in vars(module).items() if inspect.isclass(c) and hasattr(c, "model_type") and "Config" in n]
    named = sorted(
        (c for c in named if c.__name__.lower() != "pretrainedconfig"), key=lambda c: "Text" not in c.__name__
    )
    return [h for h in hints.values() if hasattr(h, "model_type")] + named


def small(config: Any) -> Any:
    """The configuration with small sizes, the experts as a plain loop."""
    for name, value in SIZES.items():
        try:
            known = getattr(config, name, "absent")
            if isinstance(known, int) or (known is None and name in MAYBE):
                setattr(config, name, value)
        except Exception:  # an attribute that differs between layers, or may not be set
            continue
    for part in vars(config).values():
        if hasattr(part, "model_type"):
            small(part)
    config._experts_implementation = "eager"
    return config
