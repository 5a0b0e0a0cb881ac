"""Checks that a state module means the same one token at a time as for a whole sequence.

The graph holds the code for single tokens. A copy of the module with random weights answers a short sequence in one
call from an empty cache, as transformers prefills, and token by token from states of zeros; both must agree.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from moec.compiler.capture.context import Context, Kept, LayerCache
from moec.compiler.capture.states import StateCache, tokens_as_sequences
from moec.compiler.errors import UnsupportedModel

log = logging.getLogger(__name__)

TOKENS = 5
# float32 sums in another order: at most 1.5e-6 in every family; a state that is not zero at first was off by 0.1
TOLERANCE = 1e-3
MOST_PARAMETERS = 1 << 28
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Cache(StateCache):
    def __init__(self, context: Context) -> None:
        self.context = context


@torch.no_grad()
def check_state_modules(calls: Mapping[nn.Module, Call], found: Mapping[int, LayerCache], tokens: int) -> None:
    """calls: how the model called each module in a dry run over `tokens` tokens. Modules that are alike count once.

    Modules with buffers are left alone: made of random numbers these would not fit each other.
    Raises: UnsupportedModel: the two ways differ.
    """
    seen = set()
    for module, call in calls.items():
        kind = type(module), tuple(p.shape for p in module.parameters())
        count = sum(p.numel() for p in module.parameters())
        if kind in seen or any(True for _ in module.buffers()):
            continue
        seen.add(kind)
        if count > MOST_PARAMETERS:
            log.info("%s: %d parameters are too many to compare its steps", type(module).__name__, count)
            continue
        _check(module, call, found, tokens)


def _check(module: nn.Module, call: Call, found: Mapping[int, LayerCache], tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(module).to_empty(device="cpu")
    for p in twin.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.3
    given: Any = tree_map_only(Tensor, lambda x: _random(x, tokens, generator), call)
    places = torch.arange(TOKENS)
    with Context(places, torch.zeros_like(places), None) as empty:
        empty.running.append(twin)
        whole = _first(_run(twin, given, _Cache(empty)))  # [1, TOKENS, ..]
    asked = {(layer, role) for layer, cache in empty.found.items() for role, _ in cache.kept}
    caches = {key: torch.zeros(1, *kept.shape) for key, kept in _states(found).items() if key in asked}
    rows = []
    with tokens_as_sequences([twin]):
        for t in range(TOKENS):
            with Context(places[t : t + 1], torch.zeros(1, dtype=torch.long), caches) as context:
                part: Any = tree_map_only(Tensor, functools.partial(_token, at=t), given)
                rows.append(_first(_run(twin, part, _Cache(context))))
    steps = torch.cat(rows, 1)
    error = float((steps - whole).abs().max() / whole.abs().max())
    if not error <= TOLERANCE:
        raise UnsupportedModel(
            f"{type(module).__name__}: a sequence token by token, from a state of zeros, gives something else than in "
            f"one piece (relative difference {error:.1e}); such layers cannot be compiled yet"
        )


def _run(module: nn.Module, call: Call, cache: _Cache) -> Any:
    args = [cache if isinstance(a, StateCache) else a for a in call[0]]
    return module(*args, **{k: cache if isinstance(a, StateCache) else a for k, a in call[1].items()})


def _states(found: Mapping[int, LayerCache]) -> dict[tuple[int, str], Kept]:
    return {(layer, role): kept for layer, cache in found.items() for role, kept in cache.kept if kept.kind == "state"}


def _per_token(x: Tensor, tokens: int) -> bool:
    return x.dim() > 1 and tuple(x.shape[:2]) == (1, tokens)


def _token(x: Tensor, at: int) -> Tensor:
    """What a tensor of the call holds of one token."""
    return x[:, at : at + 1] if _per_token(x, TOKENS) else x


def _random(x: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """A tensor like one of the call, of TOKENS tokens."""
    shape = (1, TOKENS, *x.shape[2:]) if _per_token(x, tokens) else x.shape
    if not x.dtype.is_floating_point:
        return torch.zeros(shape, dtype=x.dtype)
    return torch.randn(shape, generator=generator)


def _first(out: Any) -> Tensor:
    """What the module gives, its parts side by side where there are several of one row for each token."""
    parts = [out] if isinstance(out, Tensor) else [o for o in out if isinstance(o, Tensor)]
    return torch.cat([p.flatten(2) for p in parts if p.dim() > 2 and p.shape[1] == parts[0].shape[1]], -1)
