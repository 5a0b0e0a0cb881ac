"""Puts lifted blocks into a model: one block per class and configuration is lifted, the others are compared with it."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from moec.compiler.capture.cleanup import layer_in
from moec.compiler.capture.lifting.candidates import Candidate, candidates
from moec.compiler.capture.lifting.held import scalars, tensors
from moec.compiler.capture.lifting.lift import LiftedBlock, lift_block
from moec.compiler.capture.lifting.native import check_native
from moec.compiler.capture.lifting.refused import Refusal, Refused
from moec.compiler.capture.lifting.replacement import Replacement
from moec.compiler.capture.lifting.verify import LIMIT
from moec.passes.ir.weights import Weight, source

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Swapped:
    """A model with lifted blocks.

    model: a copy down to the blocks, which shares all else with the user's model; buffers that recipes make are meta.
    weights: recipe of each tensor of a replacement, by its name in `model`.  tensors: what the recipes read, by name.
    certificates: evidence records.  refusals: candidates that were not lifted, by name.
    """

    model: nn.Module
    weights: dict[str, Weight]
    tensors: dict[str, Tensor]
    certificates: tuple[dict[str, Any], ...]
    refusals: dict[str, Refusal]


def swap_blocks(model: nn.Module, inputs: tuple[Any, ...], names: Collection[str] | None = None) -> Swapped:
    """Lifts what can be lifted; the model is not changed. names: of the submodules to look at; None: all.

    Raises: whatever its forward raises on the inputs.
    """
    lifted: dict[str, Replacement] = {}
    known: dict[tuple[Any, ...], LiftedBlock | Refusal] = {}
    certificates: list[dict[str, Any]] = []
    refusals: dict[str, Refusal] = {}
    for candidate in candidates(model, inputs):
        name = candidate.name
        if not name or (names is not None and name not in names) or any(_nested(name, other) for other in lifted):
            continue
        block = model.get_submodule(name)
        kind = _kind(block, candidate)
        first = kind not in known
        if first:
            known[kind] = lift_block(block, candidate.args, candidate.kwargs)
        found = known[kind]
        if isinstance(found, Refusal):
            refusals[name] = found
            log.info("%s not lifted: %s", name, found)
            continue
        try:
            replacement = found.replacement if first else found.retarget(block)
            error = None if first else check_native(found.parts, block)
        except Refused as refused:
            refusals[name] = refused.refusal
            continue
        lifted[name] = replacement
        certificates.append(_evidence(name, found, error))
    weights, read = _weights(model, lifted)
    return Swapped(_swapped(model, "", lifted), weights, read, tuple(certificates), refusals)


def _nested(name: str, other: str) -> bool:
    return name == other or name.startswith(other + ".") or other.startswith(name + ".")


def _kind(block: nn.Module, candidate: Candidate) -> tuple[Any, ...]:
    """What blocks share that are lifted once: class, tensors' shapes and types, plain values, the call's form."""

    def form(value: Any) -> Any:
        return (tuple(value.shape[1:]), value.dtype, value.dim()) if isinstance(value, Tensor) else repr(value)

    shapes = tuple((n, tuple(t.shape), t.dtype) for n, t in tensors(block).items())
    values = tuple(sorted(scalars(block).items()))
    call = tuple((k, form(v)) for k, v in [*enumerate(candidate.args), *candidate.kwargs.items()])
    return type(block), shapes, values, call


def _evidence(name: str, block: LiftedBlock, error: float | None) -> dict[str, Any]:
    """A record of evidence.json. error: of a block that was compared with a lifted one of its kind."""
    record = {
        "pass": "lift-block",
        "layer": layer_in(name),
        "site": name,
        "probe": "rows",
        "regions": 1,
        "weights": "checkpoint",
        "note": "",
    }
    if error is not None:
        measured = {"max_rel_err": error, "tolerance": block.certificate["own_dtype_limit"]}
        return {**record, **measured, "certificate": {"same_as": block.certificate["block"]}}
    measured = {"max_rel_err": block.certificate["worst_relative_error_f64"], "tolerance": LIMIT}
    return {**record, **measured, "certificate": block.certificate}


def _weights(model: nn.Module, lifted: dict[str, Replacement]) -> tuple[dict[str, Weight], dict[str, Tensor]]:
    weights: dict[str, Weight] = {}
    read: dict[str, Tensor] = {}
    for name, replacement in lifted.items():
        block = model.get_submodule(name)
        read |= {f"{name}.{n}": t for n, t in tensors(block).items()}
        for attribute, tensor in replacement.named_buffers():
            recipe = replacement.recipes.get(attribute) or replacement.plain.get(attribute)
            if recipe is None:  # a constant of the block's code
                recipe = source(attribute, tuple(tensor.shape), tensor.dtype)
                read[f"{name}.{attribute}"] = tensor
            weights[f"{name}.{attribute}"] = _under(recipe, name)
    return weights, read


def _under(weight: Weight, prefix: str) -> Weight:
    """The recipe with its sources' names under a prefix."""
    if weight.op == "source":
        return dataclasses.replace(weight, args=(f"{prefix}.{weight.args[0]}",))
    return dataclasses.replace(weight, inputs=tuple(_under(w, prefix) for w in weight.inputs))


def _swapped(module: nn.Module, name: str, lifted: dict[str, Replacement]) -> nn.Module:
    """The module, copied along the paths that lead to replaced blocks."""
    if name in lifted:
        return lifted[name]
    if not any(other.startswith(f"{name}." if name else "") for other in lifted):
        return module
    twin = copy.copy(module)
    twin._modules = {k: m and _swapped(m, f"{name}.{k}".lstrip("."), lifted) for k, m in module._modules.items()}
    return twin


def refusal_texts(swapped: Swapped) -> list[str]:
    """The refusals as an error tells them, the first few."""
    return [f"{name} was not lifted ({refusal})" for name, refusal in list(swapped.refusals.items())[:3]]
