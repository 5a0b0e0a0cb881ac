"""Captures transformers causal language models: in memory, or from a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moec.compiler.capture.captured import Captured, ModelInfo
from moec.compiler.capture.graph import adopt, expert_layers, small_size_guards, symbol_names
from moec.compiler.capture.language_model import INPUTS, export_language_model
from moec.compiler.capture.template import instantiate
from moec.compiler.capture.tensors import COMPUTED, constants_of, named_tensors, sources_of, with_computed
from moec.compiler.errors import UnsupportedModel
from moec.passes.ir.weights import Read, Weight

PREFIX = "model."  # FlatModel's own attribute in front of every name of the trace


def capture_in_memory(model: Any) -> Captured:
    """Captures a transformers causal language model that has its weights; the graph's read gives the live tensors."""
    tensors = dict(named_tensors(model))
    if any(t.is_meta for t in tensors.values()):
        raise UnsupportedModel(f"{type(model).__name__} is on the meta device: capture its directory instead")
    return capture_model(model, sources_of(tensors), lambda name: tensors[name].detach())


def capture_model(
    model: Any, weights: dict[str, Weight], read: Read, directory: Path | None = None, every_layer: bool = False
) -> Captured:
    """Captures a model, on any device (meta included), whose tensors are described by `weights`.

    every_layer: trace them all, instead of two or three of each kind where that is enough.
    """
    exported = export_language_model(model, every_layer)
    program, caches = exported.program, exported.caches
    inputs = [*INPUTS, *(c.name for c in exported.traced)]
    constants = constants_of(program, PREFIX)
    gm = adopt(program, inputs, sources_of(constants, COMPUTED) | weights, PREFIX)
    if exported.plan is not None:
        whole = instantiate(gm, exported.plan, weights)
        if whole is None:
            return capture_model(model, weights, read, directory, every_layer=True)
        gm = whole
    dims = {(name, 0): "T" for name in INPUTS}
    for c in caches:
        dims[c.name, 0], dims[c.name, 1] = "N", "L"
    config = model.config.get_text_config()  # of a model that sees as well, the part that reads and writes tokens
    info = ModelInfo(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        max_positions=getattr(config, "max_position_embeddings", 0) or 0,
        dtype=next(p.dtype for p in model.parameters() if p.dtype.is_floating_point),
        eos_token_ids=_eos_token_ids(model),
        caches=caches,
        config=config.to_dict(),
        directory=directory,
    )
    return Captured(
        graph_module=gm,
        kind="language_model",
        info=info,
        read=with_computed(read, constants),
        moe_layers=expert_layers(gm),
        symbols=symbol_names(gm, dims),
        guards=small_size_guards(program),
    )


def _eos_token_ids(model: Any) -> tuple[int, ...]:
    """The stop tokens of the generation settings, else of the configuration."""
    for settings in (getattr(model, "generation_config", None), model.config):
        given = getattr(settings, "eos_token_id", None)
        if given is not None:
            return tuple(given) if isinstance(given, list | tuple) else (int(given),)
    return ()
