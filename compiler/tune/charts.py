"""The charts of a tuning report as inline SVG. Colours are the page's variables; every mark has a title to point at."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from html import escape


@dataclasses.dataclass(frozen=True)
class Bar:
    """A speed-up with its 95% bound; low and high are None where nothing was compared."""

    label: str
    value: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Point:
    """A place under the roof. intensity: FLOP per byte.  before, after: FLOP/s of the default and of the winner."""

    label: str
    intensity: float
    before: float
    after: float


@dataclasses.dataclass(frozen=True)
class Roof:
    """bytes_per_s, flops: the ceilings, and what they are."""

    bytes_per_s: float
    flops: float
    source: str


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", css: str = "") -> str:
    kind = f' class="{css}"' if css else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = "--line", extra: str = "") -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="var({colour})" stroke-width="1" {extra}/>'


def _dot(x: float, y: float, radius: float, colour: str, title: str, hollow: bool = False) -> str:
    paint = f'fill="var(--page)" stroke="var({colour})" stroke-width="1.5"' if hollow else f'fill="var({colour})"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" {paint}><title>{escape(title)}</title></circle>'


def speedup_bars(bars: Sequence[Bar]) -> str:
    """A bar for each problem from 1 to its speed-up, its bound as a line across the end."""
    left, width, row = 330, 560, 24
    most = max(1.1, *(b.high or b.value for b in bars)) * 1.02
    least = min(1.0, *(b.low or b.value for b in bars))
    least = 1.0 if least > 0.98 else least * 0.98

    def x(value: float) -> float:
        return left + width * (value - least) / (most - least)

    bottom = row * len(bars) + 8
    parts = []
    for tick in _ticks(least, most):
        parts.append(_line(x(tick), 4, x(tick), bottom, "--soft" if tick == 1 else "--line"))
        parts.append(_text(x(tick), bottom + 15, f"{tick:g}x", "middle", "soft"))
    for i, bar in enumerate(bars):
        y, end = 6 + i * row, max(x(bar.value), x(1) + 1.5)
        bound = "" if bar.low is None or bar.high is None else f", 95 % bound {bar.low:.3f} to {bar.high:.3f}"
        title = f"<title>{escape(f'{bar.label}: {bar.value:.3f}x{bound}')}</title>"
        parts.append(_text(left - 10, y + 13, bar.label, "end"))
        parts.append(
            f'<rect x="{x(1):.1f}" y="{y}" width="{end - x(1):.1f}" height="16" rx="2" fill="var(--a)">{title}</rect>'
        )
        after = end
        if bar.low is not None and bar.high is not None:
            parts.append(_line(x(bar.low), y + 8, x(bar.high), y + 8, "--ink"))
            after = max(end, x(bar.high))
        parts.append(_text(after + 8, y + 13, f"{bar.value:.2f}x" if bar.value != 1 else "default stays", css="soft"))
    return _svg(left + width + 100, bottom + 22, "speed-up of each problem over its default", parts)


def _ticks(low: float, high: float) -> list[float]:
    """Some five round numbers within low..high."""
    raw = (high - low) / 5
    step = 10 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def roofline(points: Sequence[Point], roof: Roof) -> str:
    """Both axes logarithmic; a line from the default (ring) to the winner (dot)."""
    left, top, width, height = 92, 12, 880, 330
    xs = [p.intensity for p in points] + [roof.flops / roof.bytes_per_s]
    ys = [v for p in points for v in (p.before, p.after)] + [roof.flops]
    x, y = _log_axis(xs, left, left + width), _log_axis(ys, top + height, top)
    parts = [_line(left, top + height, left + width, top + height, "--soft")]
    for tick in _decades(xs):
        parts.append(_line(x(tick), top, x(tick), top + height))
        parts.append(_text(x(tick), top + height + 16, f"{tick:g}", "middle", "soft"))
    for tick in _decades(ys):
        parts.append(_line(left, y(tick), left + width, y(tick)))
        parts.append(_text(left - 8, y(tick) + 4, _flops(tick), "end", "soft"))
    knee, start = roof.flops / roof.bytes_per_s, _ends(xs)[0]
    path = f"M{x(start):.1f},{y(start * roof.bytes_per_s):.1f} L{x(knee):.1f},{y(roof.flops):.1f} H{left + width}"
    clip = f'<clipPath id="plot"><rect x="{left}" y="{top}" width="{width}" height="{height}"/></clipPath>'
    parts.append(
        f'{clip}<path d="{path}" fill="none" stroke="var(--b)" stroke-width="2" clip-path="url(#plot)">'
        f"<title>{escape(roof.source)}</title></path>"
    )
    for p in points:
        title = f"{p.label}: {_flops(p.before)} before, {_flops(p.after)} after, {p.intensity:.1f} FLOP/byte"
        parts.append(_line(x(p.intensity), y(p.before), x(p.intensity), y(p.after), "--a"))
        parts.append(_dot(x(p.intensity), y(p.before), 4, "--f", title, hollow=True))
        parts.append(_dot(x(p.intensity), y(p.after), 4, "--a", title))
    parts.append(_text(left + width, top + height + 32, "FLOP per byte that must move", "end", "soft"))
    return _svg(left + width + 20, top + height + 38, "roofline", parts)


def _flops(value: float) -> str:
    for unit, size in (("TFLOP/s", 1e12), ("GFLOP/s", 1e9), ("MFLOP/s", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} FLOP/s"


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values) / 1.6, max(values) * 1.6


def _log_axis(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    low, high = (math.log(v) for v in _ends(values))
    return lambda value: start + (end - start) * (math.log(value) - low) / (high - low)


def _decades(values: Sequence[float]) -> list[float]:
    low, high = _ends(values)
    found = [10.0**n for n in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    return (
        found if len(found) > 1 else [m * 10**n for n in range(-3, 16) for m in (1, 2, 5) if low <= m * 10**n <= high]
    )


def search_curve(ratios: Sequence[float | None], winner: int | None) -> str:
    """Speed-ups in the order of trials, the best so far as a line; None: a trial that was no candidate any more.

    winner: its place, which is marked.
    """
    left, top, width, height = 34, 8, 300, 110
    speeds = [None if r is None else 1 / r for r in ratios]
    good = [s for s in speeds if s is not None]
    high, low = max([1.05, *good]) * 1.02, min([0.95, *sorted(good)[len(good) // 4 :]])
    bottom = top + height

    def x(i: float) -> float:
        return left + 6 + (width - 12) * i / max(1, len(ratios) - 1)

    def y(speed: float) -> float:
        return bottom - height * (min(max(speed, low), high) - low) / (high - low)

    parts = [_line(left, y(1), left + width, y(1), "--soft", 'stroke-dasharray="3 3"')]
    for tick in _ticks(low, high):
        parts.append(_text(left - 5, y(tick) + 4, f"{tick:g}", "end", "soft"))
    best, path = 0.0, ""
    for i, speed in enumerate(speeds):
        if speed is None:
            parts.append(_text(x(i), bottom + 5, "×", "middle", "bad"))
            continue
        if speed > best:
            path += f" H{x(i):.1f} V{y(speed):.1f}" if path else f"M{x(i):.1f},{y(speed):.1f}"
            best = speed
        parts.append(_dot(x(i), y(speed), 2, "--f", f"trial {i}: {speed:.3f}x"))
    if path:
        parts.append(f'<path d="{path} H{left + width - 6}" fill="none" stroke="var(--a)" stroke-width="1.5"/>')
    if winner is not None and speeds[winner] is not None:
        parts.append(_dot(x(winner), y(speeds[winner] or 1.0), 4, "--a", f"winner, trial {winner}"))
    parts.append(_text(left + width, bottom + 18, f"{len(ratios)} trials", "end", "soft"))
    return _svg(left + width + 6, bottom + 24, "search curve", parts)


@dataclasses.dataclass(frozen=True)
class Effect:
    """What candidates with one value of a parameter took, over the median of their problem: quartiles and how many."""

    value: str
    low: float
    median: float
    high: float
    count: int


def effect_chart(effects: Sequence[Effect]) -> str:
    """A row for each value: its quartiles as a bar, its median as a dot; to the left of 1 is faster."""
    left, row, width = 118, 22, 210
    reach = max(0.05, *(max(abs(math.log(e.low)), abs(math.log(e.high))) for e in effects)) * 1.05
    bottom = 6 + row * len(effects)

    def x(ratio: float) -> float:
        return left + width * (math.log(ratio) / reach + 1) / 2

    parts = [_line(x(1), 2, x(1), bottom, "--soft", 'stroke-dasharray="3 3"')]
    for i, e in enumerate(effects):
        y = 6 + i * row + 9
        title = f"{e.value}: {e.count} candidates, median {e.median:.3f} of their problem's median"
        colour = "--c" if e.median < 0.995 else "--e" if e.median > 1.005 else "--f"
        parts.append(_text(left - 10, y + 4, f"{e.value}", "end"))
        parts.append(
            f'<rect x="{x(e.low):.1f}" y="{y - 4}" width="{max(1.5, x(e.high) - x(e.low)):.1f}" height="8" rx="2" '
            f'fill="var({colour})" opacity="0.4"><title>{escape(title)}</title></rect>'
        )
        parts.append(_dot(x(e.median), y, 4, colour, title))
    for ratio in (math.exp(-reach / 1.05), 1.0, math.exp(reach / 1.05)):
        parts.append(_text(x(ratio), bottom + 14, f"{ratio:.2f}", "middle", "soft"))
    return _svg(left + width + 30, bottom + 20, "time by value of a parameter", parts)
