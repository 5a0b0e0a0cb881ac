"""Makes the numbers of tokens symbolic from the first call, so that other numbers of tokens need no new compilation.

Left alone, Dynamo takes every size of the first call as fixed, compiles again when one differs, and always takes a size
of 1 as fixed. A graph with fixed sizes is of no use here: lifting and kernels want to hold for every number of tokens.
So the first graph with such sizes is given back: Dynamo traces the same call again with them symbolic, 1 included.
Sizes that the code branches on stay fixed even then. torch.compile(dynamic=False) keeps all sizes as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._dynamo.callback import CallbackArgs, on_compile_end
from torch._dynamo.exc import TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis
from torch.fx import Node
from torch.fx.experimental import _config as fx_config

MARK = "_dynamo_propagated_dynamic_indices"
"""Dynamo's own note on a tensor that some of its sizes should be symbolic; no guard looks at it."""


class Restart(TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis):
    """Dynamo's signals to trace a call again: one passes through a backend, the other forgets the first trace."""


def restart_if_fixed(inputs: Sequence[tuple[Node, Tensor]]) -> None:
    """Has Dynamo trace the call again where sizes of its inputs are fixed that could be symbolic.

    inputs: Dynamo's placeholders and the tensors of this call, weights left out.
    Raises: Restart.
    """
    if not torch._dynamo.config.automatic_dynamic_shapes:
        return
    marked = False
    for node, tensor in inputs:
        known: set[int] = getattr(tensor, MARK, set())
        sizes = node.meta["example_value"].shape
        fixed = {d for d in token_dims(tensor) if isinstance(sizes[d], int)} - known
        if fixed:
            setattr(tensor, MARK, known | fixed)
            marked = True
    if marked:
        _without_special_sizes()
        raise Restart(restart_reason="moec: numbers of tokens made symbolic")


def token_dims(tensor: Tensor) -> set[int]:
    """Dimensions that count tokens, sequences or cached positions: the last one of ids, the one before it of vectors.

    Others count too where they are above 1; of four-dimensional caches and masks the first and third alone.
    """
    leading = tensor.dim() - (1 if tensor.dtype.is_floating_point else 0)
    if tensor.dim() == 0 or leading < 1 or (tensor.dim() > 4):
        return set()
    dims = {0, 2} if tensor.dim() == 4 else set(range(leading))
    return {d for d in dims if tensor.shape[d] > 1 or d == leading - 1}


def _without_special_sizes() -> None:
    """Until Dynamo's compilation ends, sizes of 0 and 1 are symbols like others."""
    _register_end()
    _before.append(fx_config.backed_size_oblivious)
    fx_config.backed_size_oblivious = True


_before: list[bool] = []


@functools.cache
def _register_end() -> None:
    on_compile_end(_restore)


def _restore(_: CallbackArgs) -> None:
    if _before:
        fx_config.backed_size_oblivious = _before[0]
        _before.clear()
