"""Weight formats of placed engines: what their plan counts with, and a budget's choice handed to each rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from moec.compiler.capture.captured import Captured
from moec.compiler.errors import CompileError
from moec.compiler.weights_option import WeightsOption
from moec.passes.infra.base import layer_of
from moec.passes.infra.rewrite import calls
from moec.passes.ir.experts_call import ExpertsCall
from moec.passes.ir.formats import SCALE_NAMES, FormatError, WeightFormat, parse_format
from moec.passes.ir.weights import Read
from moec.passes.placement.rank_shares import RankShares
from moec.passes.placement.weight_format import FORMATS
from moec.passes.quantise_weights import WeightPlan
from moec.passes.quantising.plan import experts_within

experts = torch.ops.moec.experts.default
_MODEL = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def planned_format(option: WeightsOption, captured: Captured, total_params: int) -> str:
    """The planner's name for what will be stored: the model's dtype, or the experts' format; where the planner does not
    know that, the next that takes as many bytes or more.

    total_params: of the model, from which a budget in bytes becomes bits per value.
    """
    model = _MODEL.get(captured.info.dtype, "bf16")
    wanted = dict(option.formats)
    if "experts" in wanted:
        found, bits = wanted["experts"].name.split("-")[0], float(wanted["experts"].bits)
    elif option.is_auto:
        found, bits = "", option.budget_bits or 8 * (option.budget_bytes or 0.0) / total_params
    else:
        return model
    if found in FORMATS and "attention" in wanted and wanted["attention"].name.split("-")[0] == found:
        return found
    apart = {f.name.removesuffix("-experts"): f for f in FORMATS.values() if f.experts_only}
    if found in apart:
        return apart[found].name
    enough = sorted((f for f in apart.values() if f.bits >= bits), key=lambda f: (f.bits, f.arithmetic == "fp8"))
    return enough[0].name if enough else model


def rank_weight_plans(
    gm: GraphModule, graphs: Sequence[GraphModule], shares: Sequence[RankShares], plan: WeightPlan, read: Read
) -> list[WeightPlan]:
    """What quantise-weights is asked for on each rank. A budget's formats are chosen once, on the whole model, so that
    all copies and parts of an expert are stored alike; shared experts keep the model's dtype then.

    Args: gm: the model before it was placed.  graphs: of the ranks, after all fusions.
    Raises: CompileError: the budget is too small, or there is nothing to choose for.
    """
    if plan.budget is None:
        return [plan] * len(graphs)
    try:
        chosen = experts_within(gm, read, plan.budget)
    except FormatError as error:
        raise CompileError(f"weights cannot be stored as asked: {error}") from error
    by_layer = {
        layer_of(n): chosen[str(_target(n.args[3]))] for n in calls(gm, experts) if _target(n.args[3]) in chosen
    }
    apart = dataclasses.replace(plan, budget=None)
    return [
        dataclasses.replace(apart, by_expert=_held_formats(graph, share, by_layer))
        for graph, share in zip(graphs, shares, strict=True)
    ]


def _target(node: object) -> str:
    return str(node.target) if isinstance(node, Node) else ""


def _held_formats(
    graph: GraphModule, shares: RankShares, by_layer: dict[int | None, tuple[WeightFormat, ...]]
) -> dict[str, tuple[WeightFormat, ...]]:
    """Name of a stack of a rank's graph -> the format of each expert in it."""
    found: dict[str, tuple[WeightFormat, ...]] = {}
    for node in calls(graph, experts):
        call, formats = ExpertsCall.of(node), by_layer.get(layer_of(node))
        if formats is None:
            continue
        held = tuple(range(len(formats)))
        if call.num_routed != len(formats):
            share = shares.layers[layer_of(node) or 0]
            assert share is not None and share.residency is not None  # its experts were cut by these
            held = share.residency.held(share.residency.group_of_rank[shares.place.stage_rank])
        plain = parse_format(SCALE_NAMES[call.w_gate_up.meta["val"].dtype])
        each = (*(formats[e] for e in held), *[plain] * call.num_shared)
        found |= {str(call.w_gate_up): each, str(call.w_down): each}
    return found
