"""What capture gives to the passes: a graph, and where its tensors come from."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import torch

from moec.passes.ir.weights import Read

CacheKind = Literal["tokens", "state"]


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """One cache input of a language model's graph.

    Args: layer: decoder layer index.  name: the placeholder, `cache_<layer>_a`, `_b` and so on.
          shape: what is kept of each token (keys [C, D], values [C, Dv], latents [C], ...) or of each sequence.
          kind: "tokens": the input is [N, L, *shape], an entry for each token; "state": it is [N, *shape], one entry of
              fixed size for each sequence, zero where the sequence is empty.
    """

    layer: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: CacheKind = "tokens"

    @property
    def num_bytes(self) -> int:
        """Of one entry."""
        return math.prod(self.shape) * self.dtype.itemsize

    def input_shape(self, slots: int, length: int) -> tuple[int, ...]:
        """Of the whole input, for so many sequences of at most so many tokens."""
        return (slots, length, *self.shape) if self.kind == "tokens" else (slots, *self.shape)


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What the rest of moec asks about a model. Fields that a plain module does not have are 0 or empty.

    Args: model_type: transformers' name of the family, or the class name of a plain module.
          max_positions: the model's own context limit.  dtype: of its parameters.
          config: the raw configuration as a dictionary.  directory: where tokenizer files may be, None in memory.
    """

    model_type: str
    vocab_size: int = 0
    hidden: int = 0
    layers: int = 0
    max_positions: int = 0
    dtype: torch.dtype = torch.float32
    eos_token_ids: tuple[int, ...] = ()
    caches: tuple[CacheSpec, ...] = ()
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    directory: Path | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        """What the caches grow by with each token."""
        return sum(c.num_bytes for c in self.caches if c.kind == "tokens")

    @property
    def state_bytes_per_sequence(self) -> int:
        """What a sequence takes in the caches whatever its length."""
        return sum(c.num_bytes for c in self.caches if c.kind == "state")


@dataclasses.dataclass(frozen=True)
class Captured:
    """A model as a graph.

    graph_module: placeholders of a language model are tokens, positions, slots (i64[T]), then the caches of each layer
        (info.caches, in order); its one output is the logits [T, V]. A plain module keeps its own tensor inputs and
        outputs. Parameters and buffers are get_attr nodes; graph_module.meta["weights"] holds
        the lazy Weight of each. Every node has meta["val"] and meta["layer"] (an int, or None outside layers).
    kind: "language_model" or "module".
    moe_layers: indices of the layers with experts.
    read: source name -> tensor; reads one tensor at a time.
    symbols: the graph's symbolic sizes, as sympy symbol name -> dimension name ("s7" -> "T").
    guards: shape guards of the trace that exclude small sizes, as text; the graph was checked without them.
    certificates: evidence records of blocks that were lifted from plain Python (see lifting/).
    """

    graph_module: torch.fx.GraphModule
    kind: Literal["language_model", "module"]
    info: ModelInfo
    read: Read
    moe_layers: tuple[int, ...] = ()
    symbols: dict[str, str] = dataclasses.field(default_factory=dict)
    guards: tuple[str, ...] = ()
    certificates: tuple[dict[str, Any], ...] = ()
