"""The seam for layers that keep a state: convolutions over the last tokens, and recurrences.

transformers gives such a layer either a whole sequence and no state, or one token and a state; the code for the one
token is the exact recurrence. So each module that asks the cache for a state (a "state module") sees the batch as T
sequences of one token, [T, 1, ..] in place of [1, T, ..], in every trace:

- a convolution that hands its new columns to `update_conv_state` gets them back behind the K columns before them in
  their sequence, from moec::shift_window, which knows how to do that for all tokens at once;
- every other state is read by moec::state_read and written by moec::state_write when the module ends. What lies between
  the two becomes the body of a moec::recurrence (recurrences.py), which goes through the tokens in turn.

Prefill, decode and a prompt in several parts are so the same graph, and no branch on the number of tokens is left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

import moec.passes.ir.state_ops  # noqa: F401  (registers moec::shift_window)
from moec.compiler.capture.context import Context, Kept
from moec.compiler.capture.sizes import expression
from moec.compiler.errors import UnsupportedModel


@torch.library.custom_op("moec::state_read", mutates_args=())
def state_read(state: Tensor, slots: Tensor) -> Tensor:
    """state [N, ..], slots i64[T] -> [T, ..]: that of each token's sequence. Only between trace and recurrences.py."""
    return state[slots]


@state_read.register_fake
def _(state, slots):
    return state.new_empty(slots.shape[0], *state.shape[1:])


@torch.library.custom_op("moec::state_write", mutates_args=("state",))
def state_write(state: Tensor, slots: Tensor, value: Tensor) -> None:
    """value [T, ..] becomes the state of each token's sequence. Only between trace and recurrences.py."""
    state[slots] = value.to(state.dtype)


@state_write.register_fake
def _(state, slots, value):
    return None


class StateCache:
    """The part of a transformers cache that holds states. In a dry run it answers as an empty cache does."""

    context: Context

    def is_recording_past(self, layer_idx: int) -> bool:
        """False: only the newest state is kept."""
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The columns [B, C, S] before the batch's, None in a dry run."""
        return self._read(layer_idx, f"conv{state_idx}")

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """conv_states [B, C, S] -> the same behind the columns before them; without a kernel size, the new state."""
        if conv_kernel_size is None:
            return self._write(layer_idx, f"conv{state_idx}", conv_states)
        kept = Kept((conv_states.shape[1], conv_kernel_size), "state", conv_states.dtype)
        state = self._keep(layer_idx, f"window{state_idx}", kept)
        if state is None:
            return F.pad(conv_states, (max(0, conv_kernel_size - conv_states.shape[2]), 0))
        return torch.ops.moec.shift_window(conv_states, state, self.context.slots)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The state before the batch, None in a dry run."""
        return self._read(layer_idx, f"recurrent{state_idx}")

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """The state after the batch is kept, and given back."""
        return self._write(layer_idx, f"recurrent{state_idx}", recurrent_states)

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """MiniMax's name for a recurrent state."""
        return self._read(layer_idx, "recurrent0")

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """MiniMax's name for keeping a recurrent state."""
        self._write(layer_idx, "recurrent0", linear_cache)

    def _read(self, layer: int, role: str) -> Tensor | None:
        context = self.context
        if context.caches is None or (layer, role) not in context.caches:
            return None
        value = torch.ops.moec.state_read(context.caches[layer, role], context.slots)
        context.written[layer, role] = value  # what is written to it in place counts
        return value

    def _write(self, layer: int, role: str, value: Tensor) -> Tensor:
        state = self._keep(layer, role, Kept(tuple(value.shape[1:]), "state", value.dtype))
        if state is not None:
            self.context.written[layer, role] = value
        return value

    def _keep(self, layer: int, role: str, kept: Kept) -> Tensor | None:
        context = self.context
        if context.caches is None:
            context.stateful[context.running[-1]] = None
        state = context.keep(layer, role, kept)
        if state is not None and tuple(map(expression, state.shape[1:])) != tuple(map(expression, kept.shape)):
            raise UnsupportedModel(f"layer {layer}: the size of its state {role} depends on the number of tokens")
        return state


@contextlib.contextmanager
def watched(model: nn.Module, context: Context) -> Iterator[None]:
    """In a dry run, context follows the modules that are running and their calls."""
    modules = list(model.modules()) if context.caches is None else []

    def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context.running.append(module)
        context.calls[module] = args, kwargs

    started = [m.register_forward_pre_hook(start, with_kwargs=True) for m in modules]
    ended = [m.register_forward_hook(lambda *_: context.running.__delitem__(-1)) for m in modules]
    try:
        yield
    finally:
        for handle in (*started, *ended):
            handle.remove()


@contextlib.contextmanager
def tokens_as_sequences(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, these modules see T sequences of one token each, and write their states when they end."""
    before = [(m, m.__dict__.get("forward")) for m in modules]
    for module, _ in before:
        module.__dict__["forward"] = _as_sequences(module.forward)
    try:
        yield
    finally:
        for module, forward in before:
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def _as_sequences(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        context = Context.current
        assert context is not None
        tokens = context.slots.shape[0]
        args, kwargs = tree_map_only(Tensor, lambda x: _swapped(x, (1, tokens)), (args, kwargs))
        out = forward(*args, **kwargs)
        if context.caches is not None:
            for (layer, role), value in context.written.items():
                torch.ops.moec.state_write(context.caches[layer, role], context.slots, value)
        context.written.clear()
        return tree_map_only(Tensor, lambda x: _swapped(x, (tokens, 1)), out)

    return run


def _swapped(x: Tensor, sizes: tuple[Any, Any]) -> Tensor:
    """The tensor with its first two dimensions swapped, where these are the sizes."""
    same = x.dim() > 1 and all(expression(n) == expression(m) for n, m in zip(x.shape, sizes, strict=False))
    return x.transpose(0, 1) if same else x
