"""Which submodules of a model may be MoE blocks, from one eager forward; selecting ones first, then the smallest."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moec.compiler.capture.lifting.held import pattern, tensors
from moec.compiler.capture.lifting.trace import SELECT


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A submodule by name, and the call that it got."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Watch(TorchDispatchMode):
    """Notes which modules are on the stack when a selection happens."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.selecting: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.split("::")[1] in SELECT:
            self.selecting |= set(self.stack)
        return func(*args, **(kwargs or {}))


def candidates(model: nn.Module, inputs: tuple[Any, ...]) -> list[Candidate]:
    """Submodules that hold tensors in the way of experts, with their calls, in the order in which to try them.

    Raises: whatever the model's forward raises.
    """
    watch, calls = _Watch(), dict[str, Candidate]()
    with _hooks(model, watch, calls), torch.no_grad(), watch:
        model(*inputs)
    parts = dict(model.named_modules())
    sizes = {n: sum(t.numel() for t in tensors(parts[n]).values()) for n in calls if may_hold_experts(parts[n])}
    return [calls[n] for n in sorted(sizes, key=lambda n: (n not in watch.selecting, sizes[n], n))]


@contextlib.contextmanager
def _hooks(model: nn.Module, watch: _Watch, calls: dict[str, Candidate]) -> Iterator[None]:
    handles = []

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            watch.stack.append(name)
            if any(isinstance(v, Tensor) and v.is_floating_point() and v.dim() >= 2 for v in [*args, *kwargs.values()]):
                calls.setdefault(name, Candidate(name, args, kwargs))

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        watch.stack.pop()

    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def may_hold_experts(module: nn.Module) -> bool:
    """Equal shapes under names that differ in a number, a tensor of three axes, or one matrix several times another."""
    held = tensors(module)
    alike: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, tensor in held.items():
        key = (pattern(name), tuple(tensor.shape))
        alike[key] = alike.get(key, 0) + 1
    shapes = [tuple(t.shape) for t in held.values()]
    if any(count >= 2 for count in alike.values()):
        return True
    matrices = {s for s in shapes if len(s) == 2}
    many = any(a[d] % b[d] == 0 and a[d] > 3 * b[d] > 3 for a in matrices for b in matrices for d in (0, 1))
    return many or any(len(s) >= 3 for s in shapes)
