"""Tuning results as one self-contained HTML page: what was gained, where it stands, how it was found, what failed."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from moec.compiler.html_page import html_page
from moec.compiler.tune import report
from moec.compiler.tune.charts import effect_chart, roofline, search_curve, speedup_bars
from moec.compiler.tune.compare import Summary, rejections, summaries
from moec.compiler.tune.errors import TuneError
from moec.compiler.tune.record import Record
from moec.compiler.tune.statistics import geometric_mean
from moec.compiler.tune.words import changes, short_name

_STYLE = """
.grid { display:grid; grid-template-columns:repeat(auto-fill,minmax(300px,1fr)); gap:18px 22px }
figure { margin:0 } figcaption { font-size:13px; margin-bottom:2px; color:var(--ink) } svg text.bad { fill:var(--e) }
code { font:12.5px ui-monospace,"DejaVu Sans Mono",monospace; overflow-wrap:anywhere }
.ring { border:1.5px solid var(--f); border-radius:50% !important; background:none !important }
"""
_SHOWN_REASONS = 40


def write_page(records: Sequence[Record], path: Path) -> None:
    """Raises: TuneError: no record to show, or the file cannot be written."""
    try:
        path.write_text(tuning_page(records), encoding="utf-8")
    except OSError as error:
        raise TuneError(f"{path}: cannot be written ({error.strerror})") from error


def tuning_page(records: Sequence[Record]) -> str:
    """The page. Raises: TuneError: there is no record."""
    if not records:
        raise TuneError("the database has no record of that kind; leave out --op, --device or --tokens")
    found = summaries(records)
    devices = sorted({s.key.device for s in found})
    title = f"Tuning on {devices[0]}" + (f" and {len(devices) - 1} more" if len(devices) > 1 else "")
    sections = (_facts(found, records), _gains(found), _roofline(found), _curves(records), _effects(records))
    return html_page(title, "".join((*sections, _winners(found), _rejected(records))), _STYLE)


def _facts(found: Sequence[Summary], records: Sequence[Record]) -> str:
    trials = sum(s.trials for s in found)
    gains = [s.speedup for s in found]
    slower = sum(1 for s in found if s.winner is not None and (s.winner.ratio_low or 0) > 1)
    failed = trials - sum(s.by_status.get("ok", 0) for s in found)
    facts = (
        (f"{geometric_mean(gains):.2f}x", "geometric mean over all problems"),
        (f"{sum(g > 1 for g in gains)} of {len(found)}", "problems faster than their default"),
        (str(slower), "slower than their default"),
        (f"{trials:,}", "candidates tried"),
        (f"{failed:,}", "of them wrong, crashed or refused"),
    )
    cells = "".join(f'<div class="fact"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for v, k in facts)
    routing = ", ".join(sorted({s.key.routing for s in found}))
    formats = ", ".join(sorted({s.key.weight_format for s in found}))
    text = (
        f"Weights: {formats}. Routing: {routing}. A candidate was checked against the reference before it was timed, "
        "next to the configuration that is used without tuning; it replaces that only where the 95 % bound says faster."
    )
    return f'<p class="soft">{escape(text)}</p><div class="facts">{cells}</div>'


def _gains(found: Sequence[Summary]) -> str:
    note = '<p class="soft">Over the default; the thin line is the 95 % bound on the median of paired times.</p>'
    return f"<h2>Speed-up</h2>{note}{speedup_bars(report.bars(found))}"


def _roofline(found: Sequence[Summary]) -> str:
    points, roof = report.points(found), report.roof(found)
    if not points or roof is None:
        return ""
    key = (
        '<div class="key"><span><i class="ring"></i>default</span>'
        '<span><i style="background:var(--a)"></i>winner</span>'
        f'<span><i style="background:var(--b)"></i>roof: {escape(roof.source)}, {roof.bytes_per_s / 1e9:,.0f} GB/s, '
        f"{roof.flops / 1e12:,.3g} TFLOP/s</span></div>"
    )
    note = (
        '<p class="soft">Bytes are what must move at least when all experts are as likely; weights that stay in a '
        "cache may lift a problem above the slope.</p>"
    )
    return f"<h2>Under the roof</h2>{note}{key}{roofline(points, roof)}"


def _curves(records: Sequence[Record]) -> str:
    drawn = "".join(
        f"<figure><figcaption>{escape(name)}</figcaption>{search_curve(ratios, winner)}</figure>"
        for name, ratios, winner in report.curves(records)
    )
    note = (
        '<p class="soft">Speed-up of each candidate in the order of trials, the best so far as a line, the winner as a '
        "large dot; × was wrong, crashed or refused. The best seen need not win: its bound decides.</p>"
    )
    return f'<h2>Search</h2>{note}<div class="grid">{drawn}</div>' if drawn else ""


def _effects(records: Sequence[Record]) -> str:
    drawn = "".join(
        f"<figure><figcaption><code>{escape(name)}</code></figcaption>{effect_chart(rows)}</figure>"
        for name, rows in report.effects(records).items()
    )
    note = (
        '<p class="soft">Time of the candidates with a value over the median of their problem and kernel: left of the '
        "line is faster. The bar holds the middle half. What goes together in the search is not told apart here.</p>"
    )
    return f'<h2>Parameters</h2>{note}<div class="grid">{drawn}</div>' if drawn else ""


def _winners(found: Sequence[Summary]) -> str:
    rows = []
    for s in found:
        used = s.winner or s.default
        changed = "" if used is None or used.is_default else changes(used, s.default)
        default_us = s.default.median_us if s.default is not None and s.default.median_us else None
        times = ("", "") if default_us is None else (f"{default_us:,.1f}", f"{default_us / s.speedup:,.1f}")
        cells = "".join(f'<td class="n">{cell}</td>' for cell in (*times, f"{s.speedup:.3f}"))
        rows.append(
            f"<tr><td>{escape(short_name(s.key))}</td><td>{escape(s.key.weight_format)}</td>"
            f"<td>{escape(s.key.routing)}</td>{cells}<td><code>{escape(changed or 'default')}</code></td></tr>"
        )
    titles = ("Problem", "Weights", "Routing", "Default µs", "In use µs", "Speed-up", "In use")
    head = "".join(f'<th class="n">{t}</th>' if t.endswith(("µs", "up")) else f"<th>{t}</th>" for t in titles)
    note = (
        '<p class="soft">The time in use is the default\'s times the paired ratio: times of different moments do not '
        "compare.</p>"
    )
    return f'<h2>Winners</h2>{note}<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _rejected(records: Sequence[Record]) -> str:
    rows = [
        f'<tr><td>{escape(status)}</td><td class="n">{count}</td><td>{escape(reason)}</td></tr>'
        for status, reasons in rejections(records).items()
        for reason, count in reasons
    ]
    if not rows:
        return "<h2>Rejected</h2><p>Every candidate was right and timed.</p>"
    more = len(rows) - _SHOWN_REASONS
    rest = f'<p class="soft">and {more} other reasons; --json has them all</p>' if more > 0 else ""
    head = '<tr><th>Status</th><th class="n">Candidates</th><th>Why</th></tr>'
    return f'<h2>Rejected</h2><div class="scroll"><table>{head}{"".join(rows[:_SHOWN_REASONS])}</table></div>{rest}'
