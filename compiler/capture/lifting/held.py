"""What a module holds: its tensors by name, registered or not, its plain values, and a float64 copy of it."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
DEPTH = 3  # lists of dictionaries of lists, and no deeper
PLAIN = (int, float, bool, str, list, dict, tuple, type(None))
_NUMBER = re.compile(r"\d+")


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and plain attributes (inside lists and dictionaries too) by dotted name.

    One tensor under two names counts once, unless the names differ in a number only: those are tied experts.
    """
    found: dict[str, Tensor] = {}
    first: dict[int, str] = {}

    def add(name: str, value: Any, depth: int = 0) -> None:
        if isinstance(value, Tensor):
            known = first.setdefault(id(value), name)
            if known == name or pattern(known) == pattern(name):
                found[name] = value
        elif isinstance(value, dict) and depth < DEPTH:
            for key, inner in value.items():
                add(f"{name}.{key}", inner, depth + 1)
        elif isinstance(value, list | tuple) and depth < DEPTH:
            for key, inner in enumerate(value):
                add(f"{name}.{key}", inner, depth + 1)

    for name, parameter in module.named_parameters(remove_duplicate=False):
        add(name, parameter)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        add(name, buffer)
    for prefix, part in module.named_modules():
        for key, value in vars(part).items():
            if not key.startswith("_") or isinstance(value, Tensor):
                add(f"{prefix}.{key}".lstrip("."), value)
    return found


def num_elements(module: nn.Module) -> int:
    """Floating-point numbers that a module holds."""
    return sum(t.numel() for t in tensors(module).values() if t.is_floating_point())


def pattern(name: str) -> str:
    """A name with its numbers blanked."""
    return _NUMBER.sub("*", name)


def scalars(module: nn.Module) -> dict[str, str]:
    """The plain values of the module and its parts, as text, by dotted name."""
    return {
        f"{prefix}.{key}".lstrip("."): repr(value)
        for prefix, part in module.named_modules()
        for key, value in vars(part).items()
        if not key.startswith("_") and isinstance(value, PLAIN)
    }


def widened(module: nn.Module) -> nn.Module:
    """A float64 copy in evaluation mode, tied experts untied; plain tensor attributes are widened too."""
    wide = copy.deepcopy(module).eval().double()
    _untie(wide)
    for part in wide.modules():
        for key, value in list(vars(part).items()):
            if not key.startswith("_"):
                vars(part)[key] = _widen(value)
    for tensor in tensors(wide).values():
        if tensor.is_leaf:
            tensor.requires_grad_(False)
    return wide


def _widen(value: Any, depth: int = 0) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in NARROW else value
    if type(value) in (list, tuple) and depth < DEPTH:
        return type(value)(_widen(v, depth + 1) for v in value)
    if isinstance(value, dict) and depth < DEPTH:
        return {k: _widen(v, depth + 1) for k, v in value.items()}
    return value


def _untie(module: nn.Module) -> None:
    """Gives modules and parameters that occur under two names which differ in a number only a copy each."""
    seen: dict[int, str] = {}
    for name, part in list(module.named_modules(remove_duplicate=False)):
        known = seen.setdefault(id(part), name)
        if known != name and pattern(known) == pattern(name):
            parent, _, key = name.rpartition(".")
            setattr(module.get_submodule(parent), key, copy.deepcopy(part))
    seen = {}
    for name, tensor in list(module.named_parameters(remove_duplicate=False)):
        known = seen.setdefault(id(tensor), name)
        if known != name and pattern(known) == pattern(name):
            parent, _, key = name.rpartition(".")
            module.get_submodule(parent)._parameters[key] = nn.Parameter(tensor.detach().clone())
