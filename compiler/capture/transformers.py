"""Captures transformers causal language models: in memory, or from a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moec.compiler.capture.captured import Captured, ModelInfo
from moec.compiler.capture.graph import adopt, expert_layers, small_size_guards, symbol_names
from moec.compiler.capture.language_model import INPUTS, export_language_model
from moec.compiler.capture.lifting import refusal_texts, swap_blocks
from moec.compiler.capture.recurrences import cut_recurrences
from moec.compiler.capture.refusal import NeedsValues
from moec.compiler.capture.template import instantiate
from moec.compiler.capture.tensors import COMPUTED, constants_of, named_tensors, sources_of, with_computed
from moec.compiler.errors import UnsupportedModel
from moec.passes.ir.weights import Read, Weight

log = logging.getLogger(__name__)

PROBE_TOKENS = 40  # of the call that shows the arguments of each block
PREFIX = "model."  # FlatModel's own attribute in front of every name of the trace


def capture_in_memory(model: Any) -> Captured:
    """Captures a transformers causal language model that has its weights; the graph's read gives the live tensors."""
    tensors = dict(named_tensors(model))
    if any(t.is_meta for t in tensors.values()):
        raise UnsupportedModel(f"{type(model).__name__} is on the meta device: capture its directory instead")
    weights = sources_of(tensors)
    try:
        return capture_model(model, weights, lambda name: tensors[name].detach())
    except NeedsValues as error:
        return _capture_lifted(model, tensors, error)


def _capture_lifted(model: Any, tensors: dict[str, Tensor], error: NeedsValues) -> Captured:
    """Captures a model whose MoE blocks are plain Python, with the blocks lifted (see lifting/).

    Raises: NeedsValues: the given error, with the reasons why blocks were not lifted.
    """
    vocabulary = model.config.get_text_config().vocab_size
    with torch.no_grad():
        swapped = swap_blocks(model, (torch.arange(PROBE_TOKENS)[None] % vocabulary,))
    if swapped.certificates:
        held = tensors | swapped.tensors
        weights = sources_of(tensors) | swapped.weights
        try:
            captured = capture_model(swapped.model, weights, lambda name: held[name].detach(), every_layer=True)
        except NeedsValues:
            log.info("%s: the blocks that were lifted are not all that depend on values", type(model).__name__)
        else:
            return dataclasses.replace(captured, certificates=swapped.certificates)
    raise NeedsValues("; ".join([str(error), *refusal_texts(swapped)])) from error


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
    _check_sizes(model, gm)
    cut_recurrences(gm)
    if exported.plan is not None:
        whole = instantiate(gm, exported.plan, weights)
        if whole is None:
            return capture_model(model, weights, read, directory, every_layer=True)
        gm = whole
    dims = {(name, 0): "T" for name in INPUTS}
    for c in caches:
        dims |= {(c.name, 0): "N"} | ({(c.name, 1): "L"} if c.kind == "tokens" else {})
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


def _check_sizes(model: Any, gm: GraphModule) -> None:
    """Every size must follow from the inputs' sizes. Raises: NeedsValues: one depends on the values of a tensor."""
    for node in gm.graph.nodes:
        if free_unbacked_symbols(node.meta.get("val")):
            raise NeedsValues(
                f"{type(model).__name__} cannot be compiled: a size in it depends on the values of tensors "
                f"({node.name}, layer {node.meta.get('layer')})"
            )


def _eos_token_ids(model: Any) -> tuple[int, ...]:
    """The stop tokens of the generation settings, else of the configuration."""
    for settings in (getattr(model, "generation_config", None), model.config):
        given = getattr(settings, "eos_token_id", None)
        if given is not None:
            return tuple(given) if isinstance(given, list | tuple) else (int(given),)
    return ()
