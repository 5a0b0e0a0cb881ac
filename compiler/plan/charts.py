"""The page's charts as inline SVG."""

from __future__ import annotations

from html import escape
from typing import Any

from moec.compiler.plan.report import GIB

_PART_COLOURS = ("--a", "--c", "--b", "--e", "--f", "--d", "--g", "--soft")


def memory_bars(plan: dict[str, Any]) -> str:
    """One bar a device: weights, cache at the stated tokens, reserve, free."""
    height, left, width = 26, 120, 800
    lanes = _lanes(plan)
    rows, most = [], max(d["memory_bytes"] for d in plan["mesh"]["devices"])
    each = plan["kv_tokens"] / plan["certificate"]["plan"]["replicas"] / lanes
    for i, (rank, device) in enumerate(zip(plan["ranks"], plan["mesh"]["devices"], strict=True)):
        memory = device["memory_bytes"]
        reserve = memory * (1 - plan["memory"]["utilisation"]) + plan["memory"]["reserved_bytes"]
        parts = (("--a", rank["weight_bytes"]), ("--c", rank["kv_bytes_per_token"] * each), ("--f", reserve))
        x, y = float(left), i * height + 4
        label = f"{rank['rank']} {device['name']}"
        row = [f'<text x="0" y="{y + 14}">{escape(label)}</text>']
        row.append(
            f'<rect x="{left}" y="{y}" width="{width * memory / most:.1f}" height="18" rx="3" fill="var(--free)"/>'
        )
        for colour, num_bytes in parts:
            row.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width * num_bytes / most:.1f}" height="18" fill="var({colour})"/>'
            )
            x += width * num_bytes / most
        row.append(f'<text class="soft" x="{left + width + 10}" y="{y + 14}">{memory / GIB:.1f} GiB</text>')
        rows.append("".join(row))
    total = len(rows) * height + 8
    svg = (
        f'<svg viewBox="0 0 {left + width + 90} {total}" role="img" aria-label="memory of each '
        f'device">{"".join(rows)}</svg>'
    )
    return svg + _key((("--a", "weights"), ("--c", "cache"), ("--f", "reserve"), ("--free", "unused")))


def _lanes(plan: dict[str, Any]) -> int:
    s = plan["certificate"]["plan"]
    return s["expert_groups"] * s["expert_tp"] // s["attention_tp"]


def step_bar(step_ms: dict[str, float]) -> str:
    """One stacked bar of the step's parts, with a key that gives each part's time."""
    total, x, out, key = sum(step_ms.values()), 0.0, [], []
    for (name, ms), colour in zip(step_ms.items(), _PART_COLOURS, strict=False):
        width = 1000 * ms / total
        out.append(f'<rect x="{x:.1f}" y="0" width="{width:.1f}" height="30" fill="var({colour})"/>')
        x += width
        if ms:
            key.append((colour, f"{name} {ms:.2f} ms, {100 * ms / total:.0f} %"))
    svg = f'<svg viewBox="0 0 1000 30" role="img" aria-label="parts of a step">{"".join(out)}</svg>'
    return svg + _key(tuple(key))


def heat_map(rows: list[list[float]], column: str, peak: float | None = None) -> str:
    """A heat map of loads over the mean: blue below 1, paper at 1, red at the peak; one row a layer."""
    peak = max(peak or 0.0, 1.01, *(max(row) for row in rows))
    columns, size = len(rows[0]), 12 if len(rows) > 24 else 16
    wide = 480 / columns
    cells = []
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            cells.append(
                f'<rect x="{40 + j * wide:.2f}" y="{18 + i * size}" width="{wide + 0.3:.2f}" height="{size}" '
                f'fill="{_colour(value, peak)}">'
                f"<title>layer {i}, {column} {j}: {value:.3f}</title></rect>"
            )
    every = max(1, len(rows) // 6)
    labels = [f'<text class="soft" x="0" y="{18 + i * size + size - 2}">{i}</text>' for i in range(0, len(rows), every)]
    title = f'<text class="soft" x="40" y="11">{columns} {column}s, one row a layer; deepest red {peak:.2f}</text>'
    height = 20 + size * len(rows)
    return (
        f'<svg viewBox="0 0 524 {height}" role="img" aria-label="expert '
        f'load">{title}{"".join(labels)}{"".join(cells)}</svg>'
    )


def _colour(value: float, peak: float) -> str:
    """Blue (47,111,179) below the mean, paper (246,246,244) at it, red (194,72,62) at the peak."""
    low, middle, high = (47, 111, 179), (246, 246, 244), (194, 72, 62)
    end, t = (high, (value - 1) / (peak - 1)) if value > 1 else (low, 1 - value)
    t = min(max(t, 0.0), 1.0)
    red, green, blue = (round(m + (e - m) * t) for m, e in zip(middle, end, strict=True))
    return f"rgb({red},{green},{blue})"


def _key(entries: tuple[tuple[str, str], ...]) -> str:
    items = "".join(f'<span><i style="background:var({colour})"></i>{escape(text)}</span>' for colour, text in entries)
    return f'<div class="key">{items}</div>'
