"""Which experts an engine uses while it runs: recorded in memory, kept in one small JSON file.

    with record_routing(engine) as recorder:                    # recording.py
        engine.generate(prompt)
    write_routing(recorder.routing("mixtral"), "routing.json")

Tuning, `moec plan --trace` and whatever sizes buffers by load read the file. Counts and pairs are sums over tokens and
say nothing of the text. A file of 32 layers of 8 experts has about 10 KB, one of 61 layers of 256 about 4 MB.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.runtime.errors import FormatError

FORMAT, VERSION = "moec-routing", 1


@dataclasses.dataclass(frozen=True)
class BatchLoad:
    """How unevenly one layer's experts were loaded in batches of a size.

    tokens: largest size of the bucket, a power of 2.  batches: how many fell into it.
    imbalance_mean, imbalance_max: of the batches, most slots of an expert over the mean of all experts.
    active_mean: experts with at least one slot.
    """

    tokens: int
    batches: int
    imbalance_mean: float
    imbalance_max: float
    active_mean: float


@dataclasses.dataclass(frozen=True)
class LayerRouting:
    """layer: its number in the model.  counts: i64[E], slots per expert.

    pairs: i64[E,E], tokens that chose both experts; symmetric, counts on the diagonal.  loads: by rising size of batch.
    """

    layer: int
    top_k: int
    counts: np.ndarray
    pairs: np.ndarray
    loads: tuple[BatchLoad, ...]

    def summary(self) -> dict[str, int | float]:
        """In short: the largest and smallest share of an expert over the mean, and experts that no token chose."""
        mean = max(self.counts.mean(), 1e-9)
        most, least = float(self.counts.max() / mean), float(self.counts.min() / mean)
        return {"layer": self.layer, "busiest": most, "quietest": least, "unused": int((self.counts == 0).sum())}


@dataclasses.dataclass(frozen=True)
class Routing:
    """A recorded run. layers: those with experts, in order."""

    model_type: str
    num_tokens: int
    layers: tuple[LayerRouting, ...]

    @property
    def name(self) -> str:
        """trace-<8 digits of the file's sha256>: the routing class that results are kept under."""
        return f"trace-{hashlib.sha256(routing_text(self).encode()).hexdigest()[:8]}"


class RoutingRecorder:
    """Adds up what the gates choose. layers: the number and the experts of each, in order."""

    def __init__(self, layers: list[tuple[int, int]]) -> None:
        self.layers = layers
        self._counts = [torch.zeros(e, dtype=torch.int64) for _, e in layers]
        self._pairs = [torch.zeros(e * e, dtype=torch.int64) for _, e in layers]
        self._top_k = [0] * len(layers)
        self._tokens = [0] * len(layers)
        self._loads: list[dict[int, list[float]]] = [{} for _ in layers]

    def add(self, place: int, experts: Tensor) -> None:
        """Takes experts i32[T,K], what the gate of the layer at `place` chose for a batch."""
        num_experts, (num_tokens, top_k) = self.layers[place][1], experts.shape
        if not num_tokens:
            return
        chosen = experts.to(torch.int64)
        counts = torch.bincount(chosen.flatten(), minlength=num_experts)
        self._counts[place] += counts
        both = chosen[:, :, None] * num_experts + chosen[:, None, :]  # [T, K, K]
        self._pairs[place] += torch.bincount(both.flatten(), minlength=num_experts**2)
        self._top_k[place], self._tokens[place] = top_k, self._tokens[place] + num_tokens
        imbalance = float(counts.max()) * num_experts / (num_tokens * top_k)
        sums = self._loads[place].setdefault(bucket(num_tokens), [0, 0.0, 0.0, 0.0])
        sums[0], sums[1], sums[2] = sums[0] + 1, sums[1] + imbalance, max(sums[2], imbalance)
        sums[3] += int((counts > 0).sum())

    def routing(self, model_type: str) -> Routing:
        """What was recorded so far."""
        layers = []
        for place, (layer, num_experts) in enumerate(self.layers):
            loads = tuple(
                BatchLoad(size, int(n), mean / n, most, active / n)
                for size, (n, mean, most, active) in sorted(self._loads[place].items())
            )
            pairs = self._pairs[place].view(num_experts, num_experts).numpy().copy()
            layers.append(LayerRouting(layer, self._top_k[place], self._counts[place].numpy().copy(), pairs, loads))
        return Routing(model_type, max(self._tokens, default=0), tuple(layers))


def bucket(num_tokens: int) -> int:
    """The smallest power of 2 that is at least num_tokens."""
    return 1 << max(0, num_tokens - 1).bit_length()


def routing_text(routing: Routing) -> str:
    """The file's text: JSON with sorted names; the same run gives the same bytes.

    "counts" stands in the clear, one row per layer, which is all that `moec plan --trace` needs. "pairs" holds for each
    layer the upper triangle without the diagonal, u32 in rows, deflated, in base64.
    """
    rows = {
        "layers": [r.layer for r in routing.layers],
        "counts": [r.counts.tolist() for r in routing.layers],
        "pairs": [_packed(r.pairs) for r in routing.layers],
        "loads": [[dataclasses.astuple(load) for load in r.loads] for r in routing.layers],
        "top_k": [r.top_k for r in routing.layers],
    }
    head = {"format": FORMAT, "version": VERSION, "model_type": routing.model_type, "num_tokens": routing.num_tokens}
    return json.dumps(head | rows, sort_keys=True, separators=(",", ":")) + "\n"


def write_routing(routing: Routing, path: str | Path) -> None:
    """Writes the file whole. Raises: FormatError: it cannot be written."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(routing_text(routing), encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise FormatError(f"{target}: cannot be written ({error.strerror})") from error


def read_routing(path: str | Path) -> Routing:
    """Raises: FormatError: absent, no such file, of a newer version, or its parts do not fit together."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); record one with moec trace") from error
    except ValueError as error:
        raise FormatError(f"{path}: is not JSON ({error}); record one with moec trace") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FormatError(f"{path}: no recorded routing (format {FORMAT}); record one with moec trace")
    if data.get("version") != VERSION:
        raise FormatError(f"{path}: version {data.get('version')}, this moec reads {VERSION}; update moec")
    try:
        names = ("layers", "top_k", "counts", "pairs", "loads")
        rows = zip(*(data[name] for name in names), strict=True)
        layers = tuple(_layer(*row) for row in rows)
        return Routing(str(data["model_type"]), int(data["num_tokens"]), layers)
    except (KeyError, TypeError, ValueError, OverflowError, zlib.error, binascii.Error) as error:
        raise FormatError(f"{path}: its parts do not fit together ({error}); record it again") from error


def _layer(layer: Any, top_k: Any, counts: Any, pairs: Any, loads: Any) -> LayerRouting:
    made = np.array(counts, dtype=np.int64)
    if made.ndim != 1 or not len(made) or (made < 0).any():
        raise ValueError(f"layer {layer}: counts are no row of whole numbers of at least 0")
    return LayerRouting(int(layer), int(top_k), made, _unpacked(pairs, made), tuple(BatchLoad(*row) for row in loads))


def _packed(pairs: np.ndarray) -> str:
    upper = pairs[np.triu_indices(len(pairs), 1)].astype("<u4")
    return base64.b64encode(zlib.compress(upper.tobytes(), 9)).decode()


def _unpacked(text: str, counts: np.ndarray) -> np.ndarray:
    upper = np.triu_indices(len(counts), 1)
    size = 4 * len(upper[0])
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(base64.b64decode(text, validate=True), size + 1)  # no more than can be right
    if len(data) != size:
        raise ValueError(f"pairs of {len(data)} bytes, expected {size}")
    pairs = np.diag(counts)
    pairs[upper] = np.frombuffer(data, "<u4")
    return np.maximum(pairs, pairs.T)
