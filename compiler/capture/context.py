"""What one trace of a transformers model carries beside its arguments: slots, caches, and what layers ask to keep.

A model's signatures carry tokens and positions only. Everything else reaches our seams (seams.py, states.py) through a
Context, which is set while the model runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moec.compiler.capture.captured import CacheKind
from moec.compiler.capture.masks import MaskMeaning

ATTENTION = ("keys", "values")  # what attention keeps; of latent attention, the latent and the rotated key


@dataclasses.dataclass(frozen=True)
class Kept:
    """One thing that a layer keeps: shape and kind as in CacheSpec; dtype None: that of the model's parameters."""

    shape: tuple[int, ...]
    kind: CacheKind = "tokens"
    dtype: torch.dtype | None = None


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one layer keeps, by role, and how its attention reads that (mask None: it has none).

    Roles are names within the layer: "keys" and "values" of attention, which come first, and whatever else asks.
    """

    kept: tuple[tuple[str, Kept], ...] = ()
    mask: MaskMeaning | None = None
    scale: float = 0.0
    softcap: float = 0.0
    sinks: bool = False


class Context:
    """The tensors of one trace that no model signature carries.

    caches: (layer, role) -> its cache input; None in a dry run, which only finds out what there is (`found`).
    running: in a dry run, the modules that are running now, innermost last.  calls: how each was called.
    stateful: the modules that asked for a state.  written: (layer, role) -> the state's new value so far.
    has_relative_bias: a module of position biases gave them by distance (relative.py).
    """

    current: ClassVar[Context | None] = None

    def __init__(self, positions: Tensor, slots: Tensor, caches: Mapping[tuple[int, str], Tensor] | None) -> None:
        self.positions, self.slots, self.caches = positions, slots, caches
        self.updates: dict[int, tuple[Tensor, Tensor]] = {}
        self.found: dict[int, LayerCache] = {}
        self.running: list[nn.Module] = []
        self.calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.stateful: dict[nn.Module, None] = {}
        self.written: dict[tuple[int, str], Tensor] = {}
        self.has_relative_bias = False

    def keep(self, layer: int, role: str, kept: Kept) -> Tensor | None:
        """Notes that a layer keeps this -> its cache input, None in a dry run."""
        known = self.found.get(layer, LayerCache())
        entries = dict(known.kept) | {role: kept}
        order = sorted(entries, key=lambda r: (*ATTENTION, r).index(r))  # stable: the others as they came
        self.found[layer] = dataclasses.replace(known, kept=tuple((r, entries[r]) for r in order))
        return None if self.caches is None else self.caches[layer, role]

    def __enter__(self) -> Context:
        Context.current = self
        return self

    def __exit__(self, *_: object) -> None:
        Context.current = None
