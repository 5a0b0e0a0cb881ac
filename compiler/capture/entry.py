"""The one way in: decides what kind of model it was given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moec.compiler.capture.captured import Captured
from moec.compiler.errors import CompileError


def capture(
    model: Any,
    example_inputs: Sequence[Any] | None = None,
    *,
    layers: int | None = None,
    random_weights: int | None = None,
    dtype: torch.dtype | None = None,
) -> Captured:
    """A model as one graph, with lazy weights.

    Args:
        model: a Hugging Face directory (config.json and, without random_weights, safetensors), a transformers causal
            language model in memory, or any torch.nn.Module.
        example_inputs: tensors for the module's forward; needed for plain modules only.
        layers: a directory's model is cut to this many decoder layers.
        random_weights: a seed: a directory's weights are random and its safetensors, if any, are not read.
        dtype: of a directory's model; None: as its config.json says.
    Raises: CheckpointError: the directory is incomplete or damaged.  UnsupportedModel: the model has something without
        a meaning here.  CompileError: the arguments do not fit together.
    """
    if isinstance(model, str | Path):
        from moec.compiler.capture.directory import capture_directory

        return capture_directory(Path(model), layers=layers, random_weights=random_weights, dtype=dtype)
    if not isinstance(model, torch.nn.Module):
        raise CompileError(f"expected a model directory or a torch.nn.Module, got a {type(model).__name__}")
    if layers is not None or random_weights is not None or dtype is not None:
        raise CompileError(
            "layers, random_weights and dtype apply to model directories only; change the module instead"
        )
    if _is_language_model(model):
        from moec.compiler.capture.transformers import capture_in_memory

        return capture_in_memory(model)
    if example_inputs is None:
        raise CompileError(f"{type(model).__name__} is a plain module: give example_inputs, the tensors of one call")
    from moec.compiler.capture.module import capture_module

    return capture_module(model, tuple(example_inputs))


def _is_language_model(model: torch.nn.Module) -> bool:
    """A transformers model with logits: it has a configuration, and can generate."""
    return hasattr(model, "config") and hasattr(model.config, "model_type") and hasattr(model, "generate")
