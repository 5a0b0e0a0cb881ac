"""Which decoder layers are of one kind, so that two or three of each need tracing and the others are copies.

Layers are of one kind when their modules are alike: classes, plain attributes, parameter shapes, what the configuration
lists for each layer, and what attention does in them. Three of a kind are traced (the first two and the last); that
they give equal subgraphs is checked afterwards (template.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from moec.compiler.capture.context import LayerCache

TRACED_OF_A_KIND = 3
_OWN = frozenset({"layer_idx", "training"})  # attributes that differ between layers of one kind


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """stack: dotted name of the list of layers. traced: the layers to trace. kind_of: layer -> number of its kind."""

    stack: str
    traced: tuple[int, ...]
    kind_of: tuple[int, ...]


def plan_layers(model: Any, found: Mapping[int, LayerCache]) -> LayerPlan | None:
    """The layers to trace, or None where the model is not a plain stack of layers or none would be a copy."""
    depth = getattr(model.config, "num_hidden_layers", 0)
    stacks = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.endswith("layers")]
    stacks = [n for n in stacks if len(model.get_submodule(n)) == depth]
    if len(stacks) != 1 or not set(found) <= set(range(depth)):
        return None
    layers: Any = model.get_submodule(stacks[0])
    tensors = [t for layer in layers for t in {id(t): t for t in layer.parameters()}.values()]
    if "num_hidden_layers" not in vars(model.config) or len({id(t) for t in tensors}) < len(tensors):
        return None  # weights shared between layers
    numbers: dict[Any, int] = {}
    kind_of = tuple(
        numbers.setdefault((_structure(layers[i]), _listed(model.config, i, depth), found.get(i)), len(numbers))
        for i in range(depth)
    )
    traced: set[int] = set()
    for kind in set(kind_of):
        members = [i for i in range(depth) if kind_of[i] == kind]
        traced |= {*members[: TRACED_OF_A_KIND - 1], members[-1]}
    return LayerPlan(stacks[0], tuple(sorted(traced)), kind_of) if len(traced) < depth else None


def _structure(layer: nn.Module) -> Any:
    modules = tuple((name, type(m), _plain(m)) for name, m in layer.named_modules())
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return modules, tuple((name, tuple(t.shape), t.dtype) for name, t in tensors)


def _plain(module: nn.Module) -> Any:
    return tuple(
        (k, repr(v))
        for k, v in sorted(vars(module).items())
        if not k.startswith("_") and k not in _OWN and isinstance(v, int | float | str | bool | tuple | list | None)
    )


def _lists(config: Any, depth: int) -> dict[str, list[Any]]:
    """The configuration's entries that hold one value for each layer."""
    return {k: v for k, v in vars(config).items() if isinstance(v, list) and len(v) == depth}


def _listed(config: Any, layer: int, depth: int) -> Any:
    return tuple((k, repr(v[layer])) for k, v in sorted(_lists(config, depth).items()))


@contextlib.contextmanager
def only_layers(model: Any, plan: LayerPlan) -> Iterator[None]:
    """While it lasts the model has the traced layers only, under their own names; it is put back afterwards."""
    stack: Any = model.get_submodule(plan.stack)
    config, depth = model.config, model.config.num_hidden_layers
    modules, lists = dict(stack._modules), _lists(config, depth)
    stack._modules = {str(i): modules[str(i)] for i in plan.traced}
    vars(config).update({name: [values[i] for i in plan.traced] for name, values in lists.items()})
    vars(config)["num_hidden_layers"] = len(
        plan.traced
    )  # past the configuration's own checks, which see one change only
    try:
        yield
    finally:
        stack._modules = modules
        vars(config).update(lists, num_hidden_layers=depth)
