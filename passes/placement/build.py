"""Builds a layout: cuts the pipeline, deals units to ranks and places experts, for one strategy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moec.passes.hardware.errors import PlacementError
from moec.passes.placement.layout import Layout, Problem
from moec.passes.placement.shares import deal_units, fewest_makespan
from moec.passes.placement.strategy import Strategy


def build_layout(
    problem: Problem,
    strategy: Strategy,
    cuts: list[int],
    resident: np.ndarray,
    token_share: np.ndarray,
    follow: str = "speed",
) -> Layout:
    """The layout of one replica.

    Args:
        cuts: stage boundaries in layers, strategy.stages + 1 of them.
        resident, token_share: [L, E, G] from place_experts.
        follow: what uneven totals follow where devices differ, "speed" (bandwidth) or "memory" (usable bytes).

    Raises:
        PlacementError: a tensor has fewer units than shares.
    """
    num_layers, num_ranks = problem.shape.num_layers, strategy.stages * strategy.stage_ranks
    weight = np.array([float(d.bytes_per_s) for d in problem.mesh.devices])
    if follow == "memory":
        weight = np.maximum(problem.usable_bytes(), 1.0)
    attention, dense, blocks = (np.zeros((num_layers, num_ranks), dtype=np.int64) for _ in range(3))
    embedding, head = np.zeros(num_ranks, dtype=np.int64), np.zeros(num_ranks, dtype=np.int64)
    for stage in range(strategy.stages):
        first = stage * strategy.stage_ranks
        for class_idx in range(len(problem.shape.layers)):
            rows = np.flatnonzero(problem.layer_class_index[cuts[stage] : cuts[stage + 1]] == class_idx) + cuts[stage]
            if not len(rows):
                continue
            lane_units = problem.attention(class_idx, strategy.attention_tp).num
            dense_units, expert = problem.dense(class_idx), problem.expert(class_idx)
            for lane in range(strategy.lanes):
                ranks = slice(first + lane * strategy.attention_tp, first + (lane + 1) * strategy.attention_tp)
                attention[rows, ranks] = _deal(lane_units, len(rows), weight[ranks], follow, strategy.rotate, 1)
                if dense_units is not None:
                    dense[rows, ranks] = _deal(dense_units.num, len(rows), weight[ranks], follow, strategy.rotate)
            for group in range(strategy.expert_groups if expert is not None else 0):
                ranks = slice(first + group * strategy.expert_tp, first + (group + 1) * strategy.expert_tp)
                blocks[rows, ranks] = _deal(expert.num, len(rows), weight[ranks], follow, strategy.rotate)
        for lane in range(strategy.lanes):
            ranks = slice(first + lane * strategy.attention_tp, first + (lane + 1) * strategy.attention_tp)
            rows_held = _deal(problem.shape.vocab, 1, weight[ranks], follow, False)[0]
            if stage == 0:
                embedding[ranks] = rows_held
            if stage == strategy.stages - 1:
                head[ranks] = rows_held
    return Layout(problem, strategy, tuple(cuts), attention, dense, blocks, resident, token_share, embedding, head)


def _deal(num_units: int, num_layers: int, weight: np.ndarray, follow: str, rotate: bool, least: int = 0) -> np.ndarray:
    """Shares in proportion to `weight`; a share never exceeds what the fastest finish allows when following speed."""
    if num_units < least * len(weight):
        raise PlacementError(
            f"{num_units} units cannot be cut in {len(weight)} shares of at least {least}; use fewer ranks"
        )
    caps = np.full(len(weight), num_units)
    if follow == "speed":
        caps = np.floor(fewest_makespan(num_units, 1 / weight) * weight + 1e-6).astype(np.int64)
    room = np.maximum(caps - least, 0)
    spare = num_units - least * len(weight)
    if room.sum() < spare:  # a slow rank must hold its least, which leaves the others no less than before
        room = np.full(len(weight), spare)
    target = np.maximum(num_units * weight / weight.sum() - least, 1e-9)
    return least + deal_units(spare, num_layers, room, target, rotate)


def layer_bytes(problem: Problem, strategy: Strategy, lanes: int, held: Callable[[int], int]) -> np.ndarray:
    """f64[L]: least stored bytes of each layer over all ranks of some lanes of a stage.

    Every rank of a lane holds attention units; an FFN may leave ranks empty, so its fixed bytes count once a copy.

    Args:
        held: num_experts -> how many experts these lanes hold.
    """
    out = np.zeros(problem.shape.num_layers)
    for class_idx, c in enumerate(problem.shape.layers):
        attention = problem.attention(class_idx, strategy.attention_tp)
        num_bytes = lanes * (attention.num * attention.bytes_per_unit + strategy.attention_tp * attention.fixed_bytes)
        dense, expert = problem.dense(class_idx), problem.expert(class_idx)
        if dense is not None:
            num_bytes += lanes * (dense.num * dense.bytes_per_unit + dense.fixed_bytes)
        if expert is not None and c.moe is not None:
            part = expert.num * expert.bytes_per_unit + expert.fixed_bytes
            num_bytes += held(c.moe.num_experts) * part
        out[problem.layer_class_index == class_idx] = num_bytes
    return out
