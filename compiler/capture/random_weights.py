"""Deterministic random weights for a model without a checkpoint: each tensor depends on the seed and its name alone."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from moec.compiler.capture.skeleton import Skeleton
from moec.compiler.errors import CheckpointError
from moec.passes.ir.weights import Weight, source, stack


class RandomWeights:
    """weights: model tensor -> Weight, stacks of experts made of one source for each expert; read: makes a source.

    Matrices are normal with standard deviation 1/sqrt(last size), norm weights 1 + normal/10, other vectors normal/50.
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
        # the generator takes 32 bits of a seed only
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        noise = torch.randn(wanted.shape, generator=generator)
        if len(wanted.shape) > 1:
            return (noise / math.sqrt(wanted.shape[-1])).to(wanted.dtype)
        return (1 + noise / 10 if "norm" in name else noise / 50).to(wanted.dtype)
