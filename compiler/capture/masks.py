"""Reads what an attention mask means from the library's own mask function, instead of building the mask."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch

from moec.compiler.errors import UnsupportedModel


@dataclasses.dataclass(frozen=True)
class MaskMeaning:
    """A causal mask in words: window, chunk: how far a token sees back, 0 for no limit."""

    window: int = 0
    chunk: int = 0

    dtype = torch.bool  # what indexers ask before they say ~mask

    def __getitem__(self, _: Any) -> MaskMeaning:
        """The mask without its axis of heads, as indexers want it."""
        return self

    def __invert__(self) -> Unseen:
        return Unseen(self)

    def __and__(self, chosen: Any) -> LimitedMask:
        """The mask and what an indexer chose; see own_indexers.py."""
        return LimitedMask(self, chosen)

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> Any:
        raise _computed(getattr(function, "__name__", str(function)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _computed(name)


@dataclasses.dataclass(frozen=True)
class LimitedMask:
    """A mask that lets through no more than what an indexer chose (an attend.ChosenBlocks)."""

    mask: MaskMeaning
    chosen: Any


def _computed(name: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the model computes with its attention mask ({name}): such attention cannot be compiled yet"
    )


@dataclasses.dataclass(frozen=True)
class Unseen:
    """Which keys a mask hides."""

    mask: MaskMeaning


def mask_meaning(function: Callable[..., Any]) -> MaskMeaning:
    """Takes a transformers mask function apart.

    The library composes masks from closures; each is known by its qualified name and its parameters are read from its
    cells. This gives the true window of every layer, where the attention's `sliding_window` argument does not.
    Raises: UnsupportedModel: a part that is not known, or no causal part.
    """
    causal, window, chunk = False, 0, 0
    todo = [function]
    while todo:
        part = todo.pop()
        name, cells = part.__qualname__, inspect.getclosurevars(part).nonlocals
        if name == "causal_mask_function":
            causal = True
        elif name == "sliding_window_overlay.<locals>.inner_mask":
            window = int(cells["sliding_window"])
        elif name == "chunked_overlay.<locals>.inner_mask":
            chunk = int(cells["chunk_size"])
        elif name == "and_masks.<locals>.and_mask":
            todo += cells["mask_functions"]
        else:
            raise UnsupportedModel(
                f"attention mask: the part {name!r} has no meaning here; "
                "known: causal, sliding_window_overlay, chunked_overlay and their and_masks"
            )
    if not causal:
        raise UnsupportedModel("attention mask: it is not causal; only causal decoders can be compiled")
    return MaskMeaning(window, chunk)
