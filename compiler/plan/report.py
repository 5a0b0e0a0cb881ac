"""A plan in the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

GIB = 2**30
SHOWN_REJECTED = 8


def print_plan(plan: dict[str, Any], problems: list[str], console: Console) -> None:
    """Prints the model's size, the devices, the step, the certificate and the closest rejected strategies."""
    low, high = plan["tokens_per_s_range"]
    title = f"{plan['model']['name']} in {plan['weights']['name']} on {plan['mesh']['name']}: {plan['strategy']}"
    console.print(f"[bold]{title}[/], {plan['tokens_per_s']:,.0f} tokens/s ({low:,.0f} to {high:,.0f})", soft_wrap=True)
    total, active = (plan["model"][name] / 1e9 for name in ("total_params", "active_params"))
    console.print(f"{total:.1f} billion parameters, {active:.1f} billion of them for a token", soft_wrap=True)
    console.print(_devices(plan))
    console.print(_step(plan))
    phases = plan["phases"]
    console.print(
        f"decode-only step {phases['decode_step_ms']:.1f} ms; prompts alone {phases['prefill_tokens_per_s']:,.0f} "
        "tokens/s",
        soft_wrap=True,
    )
    certificate = plan["certificate"]
    scope = "no plan" if certificate["scope"] == "all strategies" else f"no shares of {certificate['scope']}"
    console.print(
        f"certificate: {1 / certificate['objective']:,.1f} tokens/s, {scope} exceeds "
        f"{1 / certificate['lower_bound']:,.1f} under the "
        f"stated model, gap {100 * certificate['gap']:.3f} %; verifier: {'holds' if not problems else problems[0]}",
        soft_wrap=True,
    )
    for device, parts in plan["measured"].items():
        told = ", ".join(f"{part} x{f['factor']:.2f} ({f['points']} times)" for part, f in parts.items())
        console.print(f"measured on {device}, against the fitted model: {told}", soft_wrap=True)
    if "capacity" in plan:
        c = plan["capacity"]
        console.print(
            f"capacity {c['factor']:g}: would drop {100 * c['dropped_per_device']:.2f} % of slots counted per device, "
            f"{100 * c['dropped_per_expert']:.2f} % counted per expert (opt-in; changes outputs)",
            soft_wrap=True,
        )
    if plan["rejected"]:
        console.print(_rejected(plan))


def cannot_fit(plan: dict[str, Any]) -> str:
    """One line: why nothing fits, and what would."""
    fits, model, fmt = plan["fits"], plan["model"]["name"], plan["weights"]["name"]
    reason = next(
        (r["reason"] for r in plan["rejected"] if "does not" not in r["reason"]), plan["rejected"][0]["reason"]
    )
    advice = []
    if fits["weights"]:
        advice.append(f"--weights {fits['weights']} fits this mesh")
    if fits["meshes"]:
        advice.append(f"{fmt} fits {' or '.join(fits['meshes'][:3])}")
    more = "; ".join(advice) or "no known mesh of up to 32 devices would do"
    return f"{model} in {fmt} does not fit {plan['mesh']['name']}: {reason}; {more}"


def rank_summary(plan: dict[str, Any], rank: dict[str, Any]) -> dict[str, str]:
    """What one rank holds, in words: layers, heads, experts, vocabulary."""
    shares = rank["shares"]
    return {
        "layers": f"{shares['layers'][0]}-{shares['layers'][1] - 1}",
        "heads": _span(shares["attention_units"]),
        "experts": _span(shares["experts_per_layer"]),
        "blocks": _span(shares["expert_blocks"]),
        "vocabulary": f"{shares['embedding_rows']:,} / {shares['head_rows']:,}",
    }


def _span(values: list[int]) -> str:
    held = [v for v in values if v] or [0]  # layers without the tensor do not count
    low, high = min(held), max(held)
    return str(low) if low == high else f"{low}-{high}"


def _devices(plan: dict[str, Any]) -> Table:
    table = Table(
        title="devices (shares per layer; heads in units of one KV group)",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for column in ("rank", "device", "layers", "heads", "experts", "blocks", "vocab", "GiB", "KV B/token"):
        table.add_column(column, justify="right", no_wrap=True)
    for rank in plan["ranks"]:
        s = rank_summary(plan, rank)
        row = (s["layers"], s["heads"], s["experts"], s["blocks"], f"{rank['shares']['embedding_rows']:,}")
        numbers = (f"{rank['weight_bytes'] / GIB:.2f}", f"{rank['kv_bytes_per_token']:,.0f}")
        table.add_row(str(rank["rank"]), rank["device"], *row, *numbers)
    return table


def _step(plan: dict[str, Any]) -> Table:
    title = f"one step, {plan['sequences']:,.0f} sequences in flight, {plan['kv_tokens']:,} cached tokens fit"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    total = sum(plan["step_ms"].values())
    for name in plan["step_ms"]:
        table.add_column(name, justify="right")
    table.add_column("total ms", justify="right")
    table.add_row(*(f"{ms:.2f}" for ms in plan["step_ms"].values()), f"{total:.2f}")
    return table


def _rejected(plan: dict[str, Any]) -> Table:
    table = Table(title="closest other strategies", title_justify="left", box=box.SIMPLE)
    table.add_column("strategy")
    table.add_column("tokens/s", justify="right")
    table.add_column("reason")
    for row in plan["rejected"][:SHOWN_REJECTED]:
        table.add_row(row["strategy"], f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] else "-", row["reason"])
    return table
