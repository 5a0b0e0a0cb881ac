"""Position biases that depend on how far back a token is (Inkling's kind).

Such a module takes the positions of queries and keys and gives a bias for each pair of a batch. A ragged batch has
other pairs, so the module's own code is asked for the bias of each token at every distance below its extent: with all
queries at one position and the keys one, two, .. places before it. moec::biased_attention picks from these. That the
bias depends on the distance alone, and is zero from the extent on, is checked on a copy with random weights.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moec.compiler.capture.context import Context
from moec.compiler.errors import UnsupportedModel

POSITIONS = ("query_positions", "key_positions")
_PROBE_TOKENS = 5


@contextlib.contextmanager
def relative_biases(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model's modules of relative position biases give [1, heads, T, extent]."""
    found = [m for m in model.modules() if _is_relative(m)]
    for module in found:
        module.__dict__["forward"] = _by_distance(module)
    try:
        yield
    finally:
        for module in found:
            del module.__dict__["forward"]


def _is_relative(module: nn.Module) -> bool:
    names = tuple(inspect.signature(module.forward).parameters)
    return names[-2:] == POSITIONS and isinstance(getattr(module, "rel_extent", None), int)


def _by_distance(module: Any) -> Callable[..., Tensor]:
    extent, forward = module.rel_extent, module.forward

    def run(states: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        context = Context.current
        assert context is not None
        context.has_relative_bias = True
        if context.caches is None:
            _check(module, states)
        last = torch.full_like(query_positions, extent - 1)
        return forward(states, last, extent - 1 - torch.arange(extent, device=states.device))

    return run


def _check(module: Any, states: Tensor) -> None:
    """Raises: UnsupportedModel: the bias is not a function of the distance below the extent."""
    twin, extent = copy.deepcopy(module).to_empty(device="cpu"), module.rel_extent
    generator = torch.Generator().manual_seed(0)
    for p in twin.parameters():
        p.data = torch.randn(p.shape, generator=generator).to(p.dtype)
    forward = type(module).forward
    shape = (1, _PROBE_TOKENS, *states.shape[2:])
    probe = torch.randn(shape, generator=generator).to(states.dtype)
    places, keys = torch.arange(_PROBE_TOKENS) + extent, torch.arange(extent + _PROBE_TOKENS)
    whole = forward(twin, probe, places, keys)  # [1, heads, tokens, keys]
    last = torch.full_like(places, extent - 1)
    mine = forward(twin, probe, last, extent - 1 - torch.arange(extent))
    back = (places[:, None] - keys).clamp(min=0)
    picked = mine.gather(-1, back.clamp(max=extent - 1).expand(*mine.shape[:2], -1, -1))
    wanted = picked.masked_fill(back >= extent, 0.0)
    causal = places[:, None] >= keys
    if not torch.equal(whole.masked_fill(~causal, 0.0), wanted.masked_fill(~causal, 0.0)):
        raise UnsupportedModel(f"{type(module).__name__}: its position bias depends on more than the distance")
