"""The one way in: decides what kind of model it was given."""

from __future__ import annotations

import importlib
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
    trust_remote_code: bool = False,
    trust_pt2: bool = False,
) -> Captured:
    """A model as one graph, with lazy weights.

    Args:
        model: a Hugging Face directory (config.json and, without random_weights, safetensors), `zoo:NAME` (see
            compiler/zoo.py), `package.module:factory` (a callable that gives a module), a transformers causal language
            model in memory, any torch.nn.Module, a torch.export.ExportedProgram, in memory or as a .pt2 file, or
            an ONNX file (.onnx).
        example_inputs: tensors for the module's forward; needed for plain modules only. An ONNX file's are made from
            the shapes that it gives, unless they are given.
        layers: a directory's or zoo model is cut to this many decoder layers.
        random_weights: a seed: the weights are random and safetensors, if there are any, are not read. Zoo models have
            random weights in any case.
        dtype: of a directory's or zoo model; None: as its config.json says.
        trust_remote_code: import the code that a directory's config.json names (auto_map), and use it.
        trust_pt2: read a .pt2 file, which may run code that is in it (torch.export.load unpickles).
    Raises: CheckpointError: the directory is incomplete or damaged.  UnsupportedModel: the model has something without
        a meaning here.  CompileError: the arguments do not fit together.
    """
    if isinstance(model, str) and model.startswith("zoo:"):
        from moec.compiler.capture.directory import capture_config
        from moec.compiler.zoo import zoo_config

        return capture_config(zoo_config(model.removeprefix("zoo:"), layers), None, random_weights or 0, dtype)
    model = _made(model, trust_pt2)
    if isinstance(model, str | Path) and Path(model).suffix == ".onnx":
        from moec.compiler.capture.onnx import capture_onnx

        _check_only_for_directories("an ONNX file", layers, random_weights)
        return capture_onnx(Path(model), example_inputs, dtype)
    if isinstance(model, str | Path):
        from moec.compiler.capture.directory import capture_directory

        return capture_directory(
            Path(model),
            layers=layers,
            random_weights=random_weights,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
    what = "an exported program" if isinstance(model, torch.export.ExportedProgram) else "a module"
    _check_only_for_directories(what, layers, random_weights, dtype)
    return _in_memory(model, example_inputs)


def _made(model: Any, trust_pt2: bool) -> Any:
    """What a factory or a .pt2 file gives; the model itself where it is neither."""
    if isinstance(model, str) and ":" in model and not Path(model).exists():
        model = _from_factory(model)
    if isinstance(model, str | Path) and Path(model).suffix == ".pt2":
        from moec.compiler.capture.exported import load_pt2

        return load_pt2(Path(model), trust_pt2)
    return model


def _in_memory(model: Any, example_inputs: Sequence[Any] | None) -> Captured:
    """A model that is there already. Raises: as capture."""
    if isinstance(model, torch.export.ExportedProgram):
        from moec.compiler.capture.exported import capture_exported

        return capture_exported(model)
    if not isinstance(model, torch.nn.Module):
        raise CompileError(f"expected a model directory or a torch.nn.Module, got a {type(model).__name__}")
    from moec.compiler.families.catalogue import family_of_model

    if family_of_model(model) is not None:
        from moec.compiler.capture.directory import capture_family_in_memory

        return capture_family_in_memory(model)
    if _is_language_model(model):
        from moec.compiler.capture.transformers import capture_in_memory

        return capture_in_memory(model)
    if example_inputs is None:
        raise CompileError(f"{type(model).__name__} is a plain module: give example_inputs, the tensors of one call")
    from moec.compiler.capture.module import capture_module

    return capture_module(model, tuple(example_inputs))


def _check_only_for_directories(what: str, *given: Any) -> None:
    if any(value is not None for value in given):
        raise CompileError(
            f"layers, random_weights and dtype apply to model directories only, not to {what}; change it before"
        )


def _from_factory(name: str) -> Any:
    """What the callable `package.module:factory` gives."""
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise CompileError(
            f"{name}: expected a model directory, zoo:NAME or package.module:factory: {error}"
        ) from error
    return factory()


def _is_language_model(model: torch.nn.Module) -> bool:
    """A transformers model with logits: it has a configuration, and can generate."""
    return hasattr(model, "config") and hasattr(model.config, "model_type") and hasattr(model, "generate")
