"""A narrow twin of a wide block: the same classes and code on slices of the tensors, every width shrunk."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moec.compiler.capture.lifting.calls import Call
from moec.compiler.capture.lifting.held import tensors
from moec.compiler.capture.lifting.widths import Widths, narrowed


def with_tensors(module: nn.Module, made: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """A copy of a module whose tensors are made(name, tensor); the module's own are never copied."""
    memo: dict[int, Any] = {}
    for name, tensor in tensors(module).items():
        if id(tensor) not in memo:
            new = made(name, tensor)
            memo[id(tensor)] = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
    return copy.deepcopy(module, memo).eval()


def narrow_twin(module: nn.Module, widths: Widths, rewrite: bool) -> nn.Module:
    """The twin, in the block's own dtype. rewrite: widths that the code spells as numbers shrink as well."""
    twin = with_tensors(module, lambda name, tensor: narrowed(tensor, widths))
    seen: set[int] = set()
    for part in twin.modules():
        _narrow_attributes(part, widths, seen)
    if rewrite:
        classes: dict[type, type] = {}
        for part in twin.modules():
            part.__class__ = _narrow_class(type(part), widths, classes)
    return twin


def narrow_call(call: Call, widths: Widths) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The sample call's arguments for the twin."""
    items = dict(call.items)
    items[call.key] = items[call.key][..., : widths.sizes.get(call.hidden, call.hidden)].clone()
    args, kwargs = call.split(items)
    return tuple(args), kwargs


def names_widths(module: nn.Module, widths: Widths) -> bool:
    """Whether some method of the block's classes spells a width as a number."""
    codes = (f.__code__ for part in module.modules() for f in _methods(type(part)).values())
    return any(_names(code, widths) for code in codes)


def _narrow_attributes(part: Any, widths: Widths, seen: set[int]) -> None:
    """Integers that equal a width, among the attributes of a module and of its configuration objects."""
    if id(part) in seen:
        return
    seen.add(id(part))
    for key, value in list(vars(part).items()):
        if hasattr(value, "__dict__") and not isinstance(value, nn.Module | type | Tensor | Callable):  # type: ignore[arg-type]
            _narrow_attributes(value, widths, seen)
        elif not isinstance(value, dict) or not key.startswith("_"):
            vars(part)[key] = _narrow_value(value, widths)


def _narrow_value(value: Any, widths: Widths) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return widths.sizes.get(value, value)
    if type(value) in (tuple, list, torch.Size):
        return type(value)(_narrow_value(v, widths) for v in value)
    if type(value) is dict:
        return {k: _narrow_value(v, widths) for k, v in value.items()}
    return value


def _methods(cls: type) -> dict[str, types.FunctionType]:
    """The methods that a class has from outside torch, by name."""
    found: dict[str, types.FunctionType] = {}
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith("torch"):
            members = vars(base).items()
            found |= {n: m for n, m in members if isinstance(m, types.FunctionType) and not n.startswith("__")}
    return found


def _names(code: types.CodeType, widths: Widths) -> bool:
    return any(_names(c, widths) if _is_code(c) else _is_width(c, widths) for c in code.co_consts)


def _is_code(value: Any) -> bool:
    return isinstance(value, types.CodeType)


def _is_width(value: Any, widths: Widths) -> bool:
    if isinstance(value, tuple):
        return any(_is_width(v, widths) for v in value)
    return isinstance(value, int) and not isinstance(value, bool) and value in widths.sizes


def _narrow_class(cls: type, widths: Widths, known: dict[type, type]) -> type:
    """The class, or a subclass whose methods spell the twin's widths."""
    if cls not in known:
        changed = {n: _narrow_function(f, widths) for n, f in _methods(cls).items() if _names(f.__code__, widths)}
        known[cls] = type(cls.__name__, (cls,), {"__module__": cls.__module__, **changed}) if changed else cls
    return known[cls]


def _narrow_function(function: types.FunctionType, widths: Widths) -> types.FunctionType:
    code = _narrow_code(function.__code__, widths)
    made = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, function.__qualname__
    return made


def _narrow_code(code: types.CodeType, widths: Widths) -> types.CodeType:
    consts = tuple(_narrow_code(c, widths) if _is_code(c) else _narrow_value(c, widths) for c in code.co_consts)
    return code.replace(co_consts=consts)
