"""Indexers of sparse attention (DeepSeek-V3.2's kind): their own code runs, on keys that only remember what is asked.

An indexer scores the keys of all earlier tokens, which a trace over a ragged batch does not have. What the cache gives
it is an IndexKeys, and the arithmetic that follows, sum over heads of weight * relu(q . k * scale), causal mask, topk,
is noted step by step and becomes one moec::index_topk. Any other arithmetic is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import moec.passes.ir.sparse_ops  # noqa: F401  (registers torch.ops.moec)
from moec.compiler.capture.masks import MaskMeaning, Unseen
from moec.compiler.errors import UnsupportedModel

Choose = Callable[["IndexScores", int], Tensor]


class _Noted:
    """Something that stands for a tensor in the indexer's code; what it does not know is refused."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "matmul" and not kwargs and isinstance(args[0], Tensor):
            if isinstance(args[1], IndexKeys):
                return IndexScores(args[1], args[0])
            if isinstance(args[1], IndexScores):
                return args[1].weighted(args[0])
        if name == "relu" and isinstance(args[0], IndexScores):
            return args[0].positive()
        raise _unknown(name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _unknown(name)


def _unknown(name: str) -> UnsupportedModel:
    return UnsupportedModel(f"the model's indexer computes {name} where its scores have no such step here")


class IndexKeys(_Noted):
    """The index keys of all tokens of a sequence so far. new [T, X]: those of this batch."""

    def __init__(self, new: Tensor, choose: Choose) -> None:
        self.new, self.choose = new, choose

    def transpose(self, a: int, b: int) -> IndexKeys:
        """Of the last two axes: the form in which a product takes them."""
        if {a, b} != {-1, -2}:
            raise _unknown(f"transpose({a}, {b})")
        return self

    def unsqueeze(self, dim: int) -> IndexKeys:
        """Keys have no head axis; the indexer gives them one of size 1."""
        if dim != 1:
            raise _unknown(f"unsqueeze({dim})")
        return self

    def float(self) -> IndexKeys:
        """moec::index_topk computes in float32."""
        return self


@dataclasses.dataclass(frozen=True)
class IndexScores(_Noted):
    """Scores [1, T, I, n], and [1, T, n] once weights are there. q: f32[1, T, I, X]; weights: f32[1, T, 1, I]."""

    keys: IndexKeys
    q: Tensor
    scale: float = 1.0
    is_positive: bool = False
    weights: Tensor | None = None
    is_causal: bool = False

    @property
    def shape(self) -> tuple[float, ...]:
        """Its last size, the number of tokens so far, is not known: min(topk, it) is topk; fewer give places of -1."""
        return (math.inf,)

    def __mul__(self, scale: float) -> IndexScores:
        if self.is_positive or not isinstance(scale, float) or scale <= 0:
            raise _unknown(f"multiplication by {scale}")
        return dataclasses.replace(self, scale=self.scale * scale)

    def positive(self) -> IndexScores:
        """The scores after relu."""
        return dataclasses.replace(self, is_positive=True)

    def weighted(self, weights: Tensor) -> IndexScores:
        """Summed over the heads with weights f32[1, T, 1, I]."""
        if not self.is_positive or self.weights is not None or weights.dtype != torch.float32:
            raise _unknown("a second product, or one before relu,")
        return dataclasses.replace(self, weights=weights)

    def squeeze(self, dim: int) -> IndexScores:
        """The head axis that the weighted sum left, of size 1, goes."""
        if dim != -2 or self.weights is None:
            raise _unknown(f"squeeze({dim})")
        return self

    def masked_fill(self, hidden: Any, fill: float) -> IndexScores:
        """Places that a token does not see score -inf."""
        if hidden != Unseen(MaskMeaning()) or fill != -math.inf:
            raise _unknown(f"a mask of {hidden} with {fill}")
        return dataclasses.replace(self, is_causal=True)

    def topk(self, count: float, dim: int = -1) -> Chosen:
        """The best places, [1, T, count]; only of scores that are weighted and masked."""
        if self.weights is None or not self.is_causal or dim != -1 or self.q.dtype != torch.float32:
            raise _unknown("topk of unfinished scores")
        return Chosen(self.keys.choose(self, int(count)).unsqueeze(0))


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What topk gives. indices: i32[1, T, count]."""

    indices: Tensor


def index_topk(cache: Tensor | None, slots: Tensor, positions: Tensor) -> Choose:
    """How a layer's indexer chooses: a moec::index_topk on its cache; zeros where there is none (a dry run)."""

    def choose(scores: IndexScores, count: int) -> Tensor:
        q, new = scores.q[0], scores.keys.new
        if cache is None:
            return q.new_zeros(q.shape[0], count, dtype=torch.int32)
        assert scores.weights is not None
        weights = scores.weights[0].squeeze(1)  # [T, I]
        return torch.ops.moec.index_topk(q, new, weights, cache, slots, positions, scores.scale, count)

    return choose
