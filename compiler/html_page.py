"""The frame of the pages that commands write: one file, no scripts, no links, light and dark by the reader's choice.

Colours are variables: --a .. --g for data, --ink and --soft for text, --line, --page, --card and --free for the rest.
"""

from __future__ import annotations

from html import escape

_STYLE = """
:root { --ink:#1b2430; --soft:#5b6675; --line:#d9dee5; --page:#fbfcfd; --card:#ffffff; --a:#2f6fb3; --b:#d98324;
  --c:#3d8f6d; --d:#8a63b5; --e:#c2524b; --f:#7b8794; --g:#b8a13a; --free:#e9edf2; }
@media (prefers-color-scheme: dark) { :root { --ink:#e6eaef; --soft:#9aa5b3; --line:#36404d; --page:#14191f;
  --card:#1c232b; --free:#2a333e; } }
* { box-sizing:border-box } body { margin:0 auto; max-width:1080px; padding:28px 20px 60px; background:var(--page);
  color:var(--ink); font:15px/1.5 system-ui,"DejaVu Sans",sans-serif } h1 { font-size:26px; margin:0 0 4px;
  line-height:1.25 }
h2 { font-size:17px; margin:34px 0 8px } p { margin:6px 0; max-width:75ch } .soft { color:var(--soft) }
.facts { display:grid; grid-template-columns:repeat(auto-fit,minmax(190px,1fr)); gap:12px; margin:20px 0 }
.fact { background:var(--card); border:1px solid var(--line); border-radius:8px; padding:12px 14px }
.fact b { display:block; font-size:22px; font-variant-numeric:tabular-nums } .fact span { color:var(--soft);
font-size:13px }
.scroll { overflow-x:auto } table { border-collapse:collapse; width:100%; font-size:13.5px;
font-variant-numeric:tabular-nums }
th { text-align:left; color:var(--soft); font-weight:600 } th,td { padding:5px 10px 5px 0; border-bottom:1px solid
var(--line);
  vertical-align:top } td.n, th.n { text-align:right } svg { display:block; width:100%; height:auto } svg text {
  font:12px system-ui,"DejaVu Sans",sans-serif; fill:var(--ink) } svg text.soft { fill:var(--soft) }
.key { display:flex; flex-wrap:wrap; gap:4px 16px; font-size:13px; margin:8px 0 } .key i { display:inline-block;
width:11px;
  height:11px; border-radius:2px; margin-right:6px } .pair { display:grid; grid-template-columns:1fr 1fr; gap:24px }
@media (max-width:720px) { .pair { grid-template-columns:1fr } } details { margin:8px 0 } summary { cursor:pointer }
"""


def html_page(title: str, body: str, style: str = "") -> str:
    """The whole page. body: HTML below the headline.  style: further CSS."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}{style}</style></head>'
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )
