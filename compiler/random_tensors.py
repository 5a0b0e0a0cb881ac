"""The numbers of random weights: a tensor depends on a seed, its name, shape and dtype alone. Torch alone."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


def random_tensor(seed: int, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Matrices: normal, standard deviation 1/sqrt(last size); norm weights: 1 + normal/10; other vectors: normal/50.

    The same bits on every machine that was tried: torch 2.11 and 2.13, with AVX2 and with AVX-512.
    """
    # the generator takes 32 bits of a seed only
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    noise = torch.randn(tuple(shape), generator=generator)
    if len(shape) > 1:
        return (noise / math.sqrt(shape[-1])).to(dtype)
    return (1 + noise / 10 if "norm" in name else noise / 50).to(dtype)
