"""The moec ops of layers that keep a state of fixed size for each sequence: convolutions and recurrences.

Letters: T tokens, N sequences in the cache (its slots), C channels, K earlier tokens that a convolution sees.
The rows of a sequence are in the order of its tokens. A sequence that has no token yet has a state of zeros.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from moec.passes.ir.body import run_body


@torch.library.custom_op("moec::shift_window", mutates_args=("state",))
def shift_window(x: Tensor, state: Tensor, slots: Tensor) -> Tensor:
    """Each token after the K tokens before it in its sequence: x [T,C,1], state [N,C,K], slots i64[T] -> [T,C,K+1].

    state holds the last K tokens of each sequence, oldest first, and is moved on.
    """
    out = x.new_empty(x.shape[0], x.shape[1], state.shape[2] + 1)
    for row, slot in enumerate(slots.tolist()):
        out[row] = torch.cat([state[slot], x[row].to(state.dtype)], -1)
        state[slot] = out[row, :, 1:]
    return out


@shift_window.register_fake
def _(x, state, slots):
    return x.new_empty(x.shape[0], x.shape[1], state.shape[2] + 1)


@torch.library.custom_op("moec::recurrence", mutates_args=("states",))
def recurrence(
    inputs: Sequence[Tensor], constants: Sequence[Tensor], states: Sequence[Tensor], slots: Tensor, body: str
) -> list[Tensor]:
    """Runs a body (see body.py) over the tokens of each sequence in turn, with the states that the token before left.

    inputs [T, ..] each, constants of any shape, states [N, ..] each, slots i64[T] -> outputs [T, ..] each.
    """
    step = json.loads(body)
    out = [slots.new_empty(len(slots), *shape, dtype=getattr(torch, dtype)) for dtype, shape in step["types"]]
    for row, slot in enumerate(slots.tolist()):
        outputs, new = run_body(step, 1, [x[row : row + 1] for x in inputs], constants, [s[slot][None] for s in states])
        for whole, value in zip(out, outputs, strict=True):
            whole[row] = value[0]
        for state, value in zip(states, new, strict=True):
            state[slot] = value[0]
    return out


@recurrence.register_fake
def _(inputs, constants, states, slots, body):
    types = json.loads(body)["types"]
    return [slots.new_empty(slots.shape[0], *shape, dtype=getattr(torch, dtype)) for dtype, shape in types]
