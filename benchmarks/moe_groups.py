"""What bench_moe_layer.py --peers runs side by side: moec in one format, the peers of that format, a streaming read.

Every format is a group of its own, so that only one copy of the weights per candidate is in memory. A group's "moec"
is the format that does what the peer does; moec's other ways to hold weights of so many bits stand beside it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_layers import Layer, Shape, StreamingRead, Weights, moec_layer, transformers_layer
from moe_peers import BUILDERS, PeerAbsent
from rich.console import Console
from rich.table import Table

FEW_TOKENS = 16  # up to here a call is bound by reading weights


@dataclasses.dataclass(frozen=True)
class Group:
    """format: of "moec"; others: further formats of moec; peers: names in BUILDERS, or of transformers' experts."""

    format: str
    others: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()


GROUPS = {
    "bf16": Group("", ("bf16-packed",), ("sglang", "vllm", "onednn", "grouped_mm")),
    "int8": Group("int8-w8a8", ("int8",), ("sglang int8",)),
    "int4": Group("int4-g128-a8", ("int4-g128", "int4-g32"), ("sglang int4-g128",)),
}
"""By the name on the command line; a name that is none of these is a weight format without peers."""


def build_group(
    name: str, shape: Shape, weights: Weights, level: str, cache_dir: Path
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The candidates of a group by name, and why others are absent."""
    group = GROUPS.get(name, Group(name))
    layers: dict[str, Layer] = {}
    notes: dict[str, str] = {}

    def add(candidate: str, build: Callable[[], Layer]) -> None:
        try:
            layers[candidate] = build()
        except (PeerAbsent, ValueError, RuntimeError) as error:
            notes[candidate] = str(error).splitlines()[0][:90]

    add("moec", lambda: moec_layer(shape, weights, level, cache_dir, group.format))
    if "moec" in layers:
        moec: Any = layers["moec"]
        add("streaming read", lambda: StreamingRead(shape, weights, moec, cache_dir))
    for format in group.others:
        add(f"moec {format}", lambda f=format: moec_layer(shape, weights, level, cache_dir, f))  # type: ignore[misc]
    for peer in group.peers:
        if peer in BUILDERS:
            add(peer, lambda p=peer: BUILDERS[p](shape, weights))  # type: ignore[misc]
        else:
            add(peer, lambda p=peer: transformers_layer(shape, weights, p, False))  # type: ignore[misc]
    return layers, notes


def print_peers(console: Console, shape: Shape, cells: list[Any]) -> None:
    """A table per group: medians / minima in ms and moec's lead; then what is asked of each cell."""
    for name in dict.fromkeys(c.dtype for c in cells):
        some = [c for c in cells if c.dtype == name]
        counts = list(dict.fromkeys(c.tokens for c in some))
        title = f"{shape.name}, {name}: median / minimum ms (x: its median time over moec's in the same rounds)"
        table = Table("candidate", *(f"T={t}" for t in counts), title=title)
        for candidate in dict.fromkeys(c.candidate for c in some):
            table.add_row(candidate, *(_text(c) for c in some if c.candidate == candidate))
        console.print(table)
    for line in _verdicts(cells):
        console.print(line)


def _text(cell: Any) -> str:
    if not cell.times_ms:
        return f"[dim]{cell.note}[/dim]"
    text = f"{cell.median_ms:.2f} / {min(cell.times_ms):.2f}"
    if cell.candidate == "moec" or cell.ratio is None:
        return text
    return f"{text} {cell.ratio:.2f}x"


def _verdicts(cells: list[Any]) -> list[str]:
    """Per group and number of tokens: against the best peer, the best bf16 peer, and the streaming rate."""
    best_bf16 = {c.tokens: _best_peer([d for d in cells if d.dtype == "bf16" and d.tokens == c.tokens]) for c in cells}
    lines = []
    for name, tokens in dict.fromkeys((c.dtype, c.tokens) for c in cells):
        some = {c.candidate: c for c in cells if (c.dtype, c.tokens) == (name, tokens) and c.times_ms}
        if "moec" not in some:
            continue
        mine, parts = some["moec"].median_ms, []
        peer = _best_peer(list(some.values()))
        if peer is not None:
            parts.append(f"{peer.median_ms / mine:.2f}x the best peer ({peer.candidate})")
            for own in (c for c in some.values() if c.candidate.startswith("moec ")):
                parts.append(f"{peer.median_ms / own.median_ms:.2f}x it as {own.candidate.removeprefix('moec ')}")
        wide = best_bf16.get(tokens)
        if name != "bf16" and wide is not None:
            parts.append(f"{wide.median_ms / mine:.2f}x the best bf16 peer ({wide.candidate})")
        if tokens <= FEW_TOKENS and "streaming read" in some:
            pairs = zip(some["streaming read"].times_ms, some["moec"].times_ms, strict=True)
            parts.append(f"{100 * statistics.median(a / b for a, b in pairs):.0f}% of the streaming rate")
        error = some["moec"].error
        lines.append(f"{name} T={tokens}: {', '.join(parts)}; error {error:.4f}" if parts else f"{name} T={tokens}")
    return lines


def _best_peer(cells: list[Any]) -> Any | None:
    """The fastest candidate that is not ours."""
    peers = [c for c in cells if c.times_ms and not c.candidate.startswith(("moec", "streaming"))]
    return min(peers, key=lambda c: c.median_ms, default=None)
