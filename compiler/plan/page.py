"""A plan as one self-contained HTML page: no scripts, no links to other files."""

from __future__ import annotations

from html import escape
from typing import Any

from moec.compiler.html_page import html_page
from moec.compiler.plan.charts import heat_map, memory_bars, step_bar
from moec.compiler.plan.loads import group_loads
from moec.compiler.plan.report import GIB, rank_summary


def plan_page(plan: dict[str, Any]) -> str:
    """The page of a feasible plan document."""
    name = f"{plan['model']['name']} in {plan['weights']['name']} on {plan['mesh']['name']}"
    sections = (_facts(plan), _mesh(plan), _memory(plan), _holdings(plan), _step(plan), _experts(plan), _rejected(plan))
    return html_page(name, "".join(sections))


def _facts(plan: dict[str, Any]) -> str:
    low, high = plan["tokens_per_s_range"]
    certificate, work = plan["certificate"], plan["workload"]
    facts = (
        (f"{plan['tokens_per_s']:,.0f}", f"output tokens/s, likely {low:,.0f} to {high:,.0f}"),
        (plan["strategy"], "strategy"),
        (f"{100 * certificate['gap']:.3f} %", "gap to the proven bound"),
        (f"{plan['kv_tokens']:,}", "cached tokens fit"),
        (f"{plan['sequences']:,.0f}", "sequences in flight"),
    )
    cells = "".join(f'<div class="fact"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for v, k in facts)
    lengths = f"Requests of {work['prompt_len']} prompt and {work['gen_len']} output tokens. "
    bound = (
        f"Under the stated cost model no plan ({certificate['scope']}) exceeds "
        f"{1 / certificate['lower_bound']:,.1f} tokens/s. "
        "The range is two standard deviations of the model's error on hardware that it was not fitted on."
    )
    return f'<p class="soft">{escape(lengths + bound)}</p><div class="facts">{cells}</div>'


def _mesh(plan: dict[str, Any]) -> str:
    mesh = plan["mesh"]
    devices: dict[str, int] = {}
    for device in mesh["devices"]:
        label = f"{device['name']}, {device['memory_bytes'] / GIB:.1f} GiB, {device['bytes_per_s'] / 1e9:,.0f} GB/s"
        devices[label] = devices.get(label, 0) + 1
    rows = [(f"{count} x {label}", "device") for label, count in devices.items()]
    for name in ("inside", "between"):
        if name in mesh:
            link = mesh[name]
            where = "inside a node" if name == "inside" else "between nodes"
            rows.append(
                (f"{link['kind']}, {link['bytes_per_s'] / 1e9:,.0f} GB/s, {link['latency_s'] * 1e6:.0f} µs", where)
            )
    items = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for v, k in rows)
    return f"<h2>Mesh</h2><table>{items}</table>"


def _memory(plan: dict[str, Any]) -> str:
    return f"<h2>Memory of each device</h2>{memory_bars(plan)}"


def _holdings(plan: dict[str, Any]) -> str:
    head = (
        "Rank",
        "Device",
        "Layers",
        "Attention units",
        "Experts",
        "Expert blocks",
        "Vocabulary in / out",
        "Weights GiB",
        "KV B/token",
    )
    rows = []
    for rank in plan["ranks"]:
        s = rank_summary(plan, rank)
        cells = (str(rank["rank"]), rank["device"], s["layers"], s["heads"], s["experts"], s["blocks"], s["vocabulary"])
        numbers = (f"{rank['weight_bytes'] / GIB:.2f}", f"{rank['kv_bytes_per_token']:,.0f}")
        rows.append("<tr>" + "".join(f'<td class="n">{escape(c)}</td>' for c in (*cells, *numbers)) + "</tr>")
    titles = "".join(f'<th class="n">{t}</th>' for t in head)
    units = "; ".join(_unit_text(u) for u in plan["units"])
    return (
        f'<h2>What each device holds</h2><div class="scroll"><table><tr>{titles}</tr>{"".join(rows)}</table></div>'
        f'<p class="soft">Shares are per layer: 4-5 alternates between layers. {escape(units)}.</p>'
    )


def _unit_text(unit: dict[str, Any]) -> str:
    parts = [f"{unit['attention']['units']} attention units of {unit['attention']['query_heads']:g} query heads"]
    parts += [f"{unit[k]['units']} {k} blocks of {unit[k]['width']} columns" for k in ("dense", "expert") if k in unit]
    return f"{unit['layers']} layers with " + ", ".join(parts)


def _step(plan: dict[str, Any]) -> str:
    return f"<h2>Where a step's {sum(plan['step_ms'].values()):.1f} ms go</h2>{step_bar(plan['step_ms'])}"


def _experts(plan: dict[str, Any]) -> str:
    before, after = group_loads(plan)
    source = escape(plan["routing"]["source"])
    if len(before[0]) < 2:
        text = (
            "Every device holds a slice of every expert, so routing cannot unbalance them. Use of each expert over "
            "its layer's mean:"
        )
        return (
            f'<h2>Expert load</h2><p class="soft">{text} '
            f"({source})</p>{heat_map(group_loads(plan, by_expert=True)[0], 'expert')}"
        )
    peak = max(max(row) for row in before + after)
    text = f"Load of each expert group over its layer's mean, by layer; 1 is even. Trace: {source}."
    worst = [max(max(row) for row in rows) for rows in (before, after)]
    return (
        f'<h2>Expert load before and after placement</h2><p class="soft">{text}</p><div class="pair">'
        f"<div><p>In order of number, worst {worst[0]:.2f}</p>{heat_map(before, 'group', peak)}</div>"
        f"<div><p>As placed, worst {worst[1]:.2f}</p>{heat_map(after, 'group', peak)}</div></div>"
    )


def _rejected(plan: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(r['strategy'])}</td><td class='n'>{r['tokens_per_s']:,.0f}</td>"
        f"<td class='n'>{r['tokens_per_s_bound']:,.0f}</td><td>{escape(r['reason'])}</td></tr>"
        for r in plan["rejected"]
    )
    head = "<tr><th>Strategy</th><th class='n'>Tokens/s</th><th class='n'>At most</th><th>Why not</th></tr>"
    return f'<h2>Rejected strategies</h2><div class="scroll"><table>{head}{rows}</table></div>'
