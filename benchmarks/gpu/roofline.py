"""The roofline of a results file as an SVG: what each layer reached against what the device reached in the same run.

python benchmarks/gpu/roofline.py results.json roofline.svg
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 960, 600, 70, 50, 250, 50
COLOURS = ("#1b6ca8", "#c44536", "#2a9d4a", "#8e44ad", "#b8860b", "#16a2a2", "#7f5539", "#5f6b73")


def points(result: Mapping[str, Any]) -> Iterator[tuple[str, float, float, int]]:
    """Layer, FLOP per byte, FLOP/s and tokens of each of our times with even routing."""
    for layer in result["layers"]:
        for row in layer["rows"]:
            if not row["skew"]:
                name = f"{layer['shape']} {layer['size']}" + (" tuned" if layer.get("tuned") else "")
                yield name, row["flops"] / row["bytes"], row["flops"] / row["us"] * 1e6, row["tokens"]


class Axes:
    """Logarithmic axes over a range of powers of ten."""

    def __init__(self, xs: list[float], ys: list[float]) -> None:
        self.x, self.y = _decades(xs), _decades(ys)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is in the picture."""
        across = (math.log10(x) - self.x[0]) / (self.x[1] - self.x[0])
        up = (math.log10(y) - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def _decades(values: list[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def draw(result: Mapping[str, Any]) -> str:
    """The picture. Cost: a circle for each time."""
    found, ceilings = list(points(result)), result["ceilings"]
    memory, compute = ceilings["copy_bytes_per_s"], ceilings["matmul_flop_per_s"]
    knee = compute / memory
    axes = Axes([p[1] for p in found] + [knee], [p[2] for p in found] + [compute])
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        _text(LEFT, 24, f"{result['device']}: copy {memory / 1e12:.3g} TB/s, matmul {compute / 1e12:.3g} TFLOP/s", 15),
        *_grid(axes),
        *_roof(axes, memory, compute, knee),
    ]
    names = list(dict.fromkeys(p[0] for p in found))
    for name, x, y, tokens in found:
        across, up = axes.place(x, y)
        colour, fill = _paint(name, names)
        title = f"<title>{escape(name)}, {tokens} tokens: {y / 1e12:.3g} TFLOP/s</title>"
        out.append(f'<circle cx="{across:.1f}" cy="{up:.1f}" r="4" stroke="{colour}" fill="{fill}">{title}</circle>')
    for i, name in enumerate(names):
        at, (colour, fill) = TOP + 18 * i, _paint(name, names)
        out.append(f'<circle cx="{WIDTH - RIGHT + 20}" cy="{at}" r="4" stroke="{colour}" fill="{fill}"/>')
        out.append(_text(WIDTH - RIGHT + 30, at + 4, name))
    return "\n".join([*out, "</svg>\n"])


def _paint(name: str, names: list[str]) -> tuple[str, str]:
    """The colour of a layer's shape, and what fills its circles."""
    shapes = list(dict.fromkeys(n.split()[0] for n in names))
    colour = COLOURS[shapes.index(name.split()[0]) % len(COLOURS)]
    return colour, colour if " large" in name else "white"


def _grid(axes: Axes) -> Iterator[str]:
    for power in range(axes.x[0], axes.x[1] + 1):
        x, bottom = axes.place(10.0**power, 10.0 ** axes.y[0])
        yield f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom:.1f}" stroke="#ddd"/>'
        yield _text(x - 10, bottom + 18, f"1e{power}")
    for power in range(axes.y[0], axes.y[1] + 1):
        left, y = axes.place(10.0 ** axes.x[0], 10.0**power)
        yield f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>'
        yield _text(left - 40, y + 4, f"1e{power}")
    yield _text(LEFT, HEIGHT - 12, "FLOP per byte that must move (across), FLOP/s (up)")


def _roof(axes: Axes, memory: float, compute: float, knee: float) -> Iterator[str]:
    low, high = 10.0 ** axes.x[0], 10.0 ** axes.x[1]
    start = max(low, 10.0 ** axes.y[0] / memory)
    corners = [axes.place(start, memory * start), axes.place(knee, compute), axes.place(high, compute)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    yield f'<polyline points="{path}" fill="none" stroke="black" stroke-width="2"/>'


def _text(x: float, y: float, text: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}">{escape(text)}</text>'


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    target.write_text(draw(json.loads(source.read_text())))


if __name__ == "__main__":
    main()
