"""Expert group loads of a plan document, for charts."""

from __future__ import annotations

from typing import Any


def group_loads(plan: dict[str, Any], by_expert: bool = False) -> tuple[list[list[float]], list[list[float]]]:
    """Per MoE layer, each group's load over the layer's mean: with experts dealt in order of number, and as placed.

    With by_expert both hold each expert's own load instead.
    """
    counts = iter(plan["routing"]["counts"])
    groups = plan["certificate"]["plan"]["expert_groups"]
    before, after = [], []
    for layer in plan["layers"]:
        if "resident" not in layer:
            continue
        row = next(counts)
        total = sum(row) or 1
        if by_expert:
            loads = [n / total * len(row) for n in row]
            before.append(loads)
            after.append(loads)
            continue
        placed = [0.0] * groups
        for expert, group, share in layer["resident"]:
            placed[group] += share * row[expert] / total * groups
        in_order = [0.0] * groups
        for expert, n in enumerate(row):
            in_order[expert * groups // len(row)] += n / total * groups
        before.append(in_order)
        after.append(placed)
    return before, after
