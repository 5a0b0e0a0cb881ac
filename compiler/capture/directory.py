"""Captures a Hugging Face directory: reads config.json and tensor headers, no weight, no remote code unless trusted."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch

from moec.compiler.capture.captured import Captured
from moec.compiler.capture.checkpoint import Checkpoint, read_json
from moec.compiler.capture.cleanup import layer_in
from moec.compiler.capture.configuration import load_config
from moec.compiler.capture.quantisation import Quantisation, quantisation_of
from moec.compiler.capture.quantised import dequantised_tensors
from moec.compiler.capture.random_weights import RandomWeights
from moec.compiler.capture.recipes import transformers_recipes
from moec.compiler.capture.remote_code import MODEL, load_remote_model, remote_references
from moec.compiler.capture.skeleton import Skeleton, build_skeleton
from moec.compiler.capture.tensors import COMPUTED, named_tensors, sources_of, with_computed
from moec.compiler.capture.transformers import capture_in_memory, capture_model
from moec.compiler.errors import CheckpointError, UnsupportedModel
from moec.compiler.families.experts import stack_experts
from moec.passes.ir.weights import Read, Weight, cast


def capture_directory(
    directory: Path,
    *,
    layers: int | None = None,
    random_weights: int | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Captured:
    """See moec.compiler.capture.capture. The model is built and traced on the meta device.

    Remote code that cannot be traced without values (experts in plain Python) is loaded with its weights and lifted.
    """
    config = load_config(directory, layers, trust_remote_code)
    checkpoint = Checkpoint.open(directory) if random_weights is None else None
    raw, origin = read_json(directory / "config.json"), str(directory / "config.json")
    quantisation = quantisation_of(raw, origin)
    remote = MODEL in (remote_references(raw, origin) if trust_remote_code else {})
    captured = None
    try:
        captured = capture_config(config, checkpoint, random_weights or 0, dtype, directory, quantisation, remote)
    except UnsupportedModel:  # a trace on the meta device cannot say whether values would have helped
        if not remote or checkpoint is None or quantisation is not None:
            raise
    if captured is None:  # not in the handler: a trace that failed is alive until it ends, and lifting traces again
        model = load_remote_model(directory, config, dtype or config.dtype or _stored_dtype(checkpoint))
        captured = capture_in_memory(model)
    return dataclasses.replace(captured, info=_with_stop_tokens(captured.info, directory))


def capture_config(
    config: Any,
    checkpoint: Checkpoint | None,
    seed: int,
    dtype: torch.dtype | None,
    directory: Path | None = None,
    quantisation: Quantisation | None = None,
    trust_remote_code: bool = False,
) -> Captured:
    """Captures the model of a configuration, with the checkpoint's weights or, without one, random ones."""
    skeleton = build_skeleton(config, dtype or config.dtype or _stored_dtype(checkpoint), trust_remote_code)
    read: Read
    if checkpoint is None:
        made = RandomWeights(seed, skeleton)
        weights, read = made.weights, made.read
    else:
        weights, read = stored_weights(skeleton, checkpoint, quantisation), checkpoint.read
    weights = stack_experts(skeleton.model, weights) | sources_of(skeleton.computed, COMPUTED)
    return capture_model(skeleton.model, weights, with_computed(read, skeleton.computed), directory)


def capture_family_in_memory(model: Any) -> Captured:
    """Captures a model of compiler/families that has its weights, through a twin on the meta device."""
    tensors = dict(named_tensors(model))
    dtype = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    skeleton = build_skeleton(copy.deepcopy(model.config), dtype)
    weights = stack_experts(skeleton.model, sources_of(tensors))
    return capture_model(skeleton.model, weights, lambda name: tensors[name].detach())


def _stored_dtype(checkpoint: Checkpoint | None) -> torch.dtype:
    """The dtype of a model whose config.json names none: of the first floating tensor of 16 bits or more."""
    stored = checkpoint.tensors.values() if checkpoint is not None else ()
    return next((t.dtype for t in stored if t.dtype.is_floating_point and t.dtype.itemsize > 1), torch.float32)


def stored_weights(
    skeleton: Skeleton, checkpoint: Checkpoint, quantisation: Quantisation | None = None
) -> dict[str, Weight]:
    """Model tensor -> Weight in the model's dtype, tied names included.

    Raises: CheckpointError: a tensor is missing, superfluous, or of another shape than the configuration implies.
    """
    wanted = skeleton.tensors
    made = transformers_recipes(skeleton.model, dequantised_tensors(checkpoint, quantisation))
    for name in [n for n in made if n not in wanted]:
        weight = made.pop(name)
        if not skeleton.ignores(name):
            first = next(iter(weight.sources()))
            raise CheckpointError(
                f"{checkpoint.directory}: tensor {first} has no place in a {skeleton.model.config.model_type} model of "
                "this config.json; is the configuration of another model?"
            )
    found: dict[str, Weight] = {}
    for name, tensor in wanted.items():
        recipe = next((made[n] for n in skeleton.names_of(name) if n in made), None)
        if recipe is None:
            raise CheckpointError(
                f"{checkpoint.directory}: tensor {name} (layer {layer_in(name)}) is missing; expected shape "
                f"{list(tensor.shape)}; download the checkpoint again"
            )
        if recipe.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{checkpoint.directory}: tensor {_summary(recipe)}: config.json implies shape {list(tensor.shape)} "
                f"for {name}, got {list(recipe.shape)}"
            )
        found[name] = cast(recipe, tensor.dtype)
    _check_ties(skeleton, made, checkpoint)
    return found


def _summary(weight: Weight) -> str:
    names = list(weight.sources())
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _check_ties(skeleton: Skeleton, made: dict[str, Weight], checkpoint: Checkpoint) -> None:
    """A checkpoint may store a tied tensor twice; both copies must then be equal, since the model has only one."""
    for names in skeleton.ties:
        stored = [made[n] for n in names if n in made]
        first = stored[0].materialise(checkpoint.read) if len(stored) > 1 else None
        for other in stored[1:]:
            assert first is not None
            if not torch.equal(first, other.materialise(checkpoint.read)):
                raise CheckpointError(
                    f"{checkpoint.directory}: config.json ties {stored[0]} and {other}, but the checkpoint holds two "
                    "different tensors; set tie_word_embeddings to false"
                )


def _with_stop_tokens(info: Any, directory: Path) -> Any:
    """generation_config.json, where there is one, has the last word on stop tokens."""
    info = dataclasses.replace(info, directory=directory)
    file = directory / "generation_config.json"
    given = read_json(file).get("eos_token_id") if file.exists() else None
    if given is None:
        return info
    return dataclasses.replace(info, eos_token_ids=tuple(given) if isinstance(given, list) else (int(given),))
