"""Deterministic random weights for a model without a checkpoint: each tensor depends on the seed and its name alone."""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.capture.skeleton import Skeleton
from moec.compiler.errors import CheckpointError
from moec.compiler.random_tensors import random_tensor
from moec.passes.ir.weights import Weight, source, stack


class RandomWeights:
    """weights: model tensor -> Weight, stacks of experts made of one source for each expert; read: makes a source.

    sources: by name; their numbers are compiler/random_tensors.py's.
    """

    def __init__(self, seed: int, skeleton: Skeleton) -> None:
        self.seed = seed
        self.sources: dict[str, Weight] = {}
        self.weights = {name: self._weight(skeleton.names_of(name), t) for name, t in skeleton.tensors.items()}

    def _weight(self, names: tuple[str, ...], tensor: Tensor) -> Weight:
        name, shape = min(names), tuple(tensor.shape)
        if len(shape) == 3 and "experts" in name:
            return stack([self._source(f"{name}.{e}", shape[1:], tensor.dtype) for e in range(shape[0])])
        return self._source(name, shape, tensor.dtype)

    def _source(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Weight:
        return self.sources.setdefault(name, source(name, shape, dtype))

    def read(self, name: str) -> Tensor:
        """The random tensor of this source name."""
        wanted = self.sources.get(name)
        if wanted is None:
            raise CheckpointError(f"no random weight is called {name}")
        return random_tensor(self.seed, name, wanted.shape, wanted.dtype)
