"""Random uneven plans of a small model, as engine folders."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import random
from pathlib import Path
from typing import Any

import torch
from placed import BEFORE_PLACE, document
from transformers import MixtralConfig, MixtralForCausalLM

from moec.compiler.capture import capture
from moec.compiler.capture.captured import Captured
from moec.compiler.export.engine import Placement, Report, Target, export_engine
from moec.compiler.options import CompileOptions
from moec.compiler.ranks import AFTER, lower_rank, placement_record
from moec.passes.infra.base import Ledger, PassContext
from moec.passes.infra.runner import run_passes
from moec.passes.pipeline import PIPELINE
from moec.passes.placement.rank_shares import num_ranks, rank_shares
from moec.passes.placement.strategy import Strategy
from moec.passes.placing.place import finish, place

HEADS, EXPERTS, WORDS, LAYERS = 6, 5, 131, 3


@functools.cache
def model(dtype: torch.dtype, one_expert: bool) -> tuple[Captured, dict[str, Any], MixtralForCausalLM]:
    """6 heads, 5 experts of 3 blocks of columns, 3 layers, 131 words. one_expert: all tokens choose the same experts,
    because all experts score alike and ties go to the first."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=48, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS, vocab_size=WORDS
    )
    config.num_key_value_heads, config.num_local_experts = HEADS, EXPERTS
    whole = MixtralForCausalLM(config).eval().to(dtype)
    if one_expert:
        for layer in whole.model.layers:
            layer.mlp.gate.weight.data.zero_()
    captured = capture(whole)
    run_passes(captured.graph_module, PIPELINE[:BEFORE_PLACE], PassContext(read=captured.read), evidence="off")
    return captured, config.to_dict(), whole


@functools.cache
def strategies(ranks: int) -> tuple[str, ...]:
    """Every strategy that so many ranks and this model allow."""
    found = []
    for replicas in _divisors(ranks):
        for stages in _divisors(ranks // replicas):
            size = ranks // replicas // stages
            found += [
                Strategy(replicas, stages, attention, groups, size // groups, spare)
                for attention in _divisors(size)
                for groups in _divisors(size)
                for spare in ((0, 1) if groups > 1 else (0,))
                if stages <= LAYERS and attention <= HEADS and groups <= EXPERTS
            ]
    return tuple(dict.fromkeys(s.name for s in found))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@functools.cache
def _document(strategy: str, dtype: torch.dtype) -> dict[str, Any]:
    return document(model(dtype, False)[1], strategy)


def random_plan(draw: random.Random, strategy: str, dtype: torch.dtype) -> dict[str, Any]:
    """The planner's document with shares, and homes and copies of experts, drawn at random."""
    made = copy.deepcopy(_document(strategy, dtype))
    s = made["certificate"]["plan"]
    for layer in made["layers"]:
        _redraw(draw, layer["attention"], s["attention_tp"], 1)
        _redraw(draw, layer["experts"], s["expert_tp"], 0)
        layer["resident"] = _homes(draw, s["expert_groups"])
    _redraw(draw, made["head"], s["attention_tp"], 1)
    _redraw(draw, made["embedding"], s["attention_tp"], 1)
    return made


def _redraw(draw: random.Random, held: list[int], ranks: int, least: int) -> None:
    """Deals the units of each `ranks` neighbours anew."""
    for start in range(0, len(held), ranks):
        total = sum(held[start : start + ranks])
        if total >= least * ranks and total:
            cuts = sorted(draw.randint(0, total - least * ranks) for _ in range(ranks - 1))
            ends = [0, *cuts, total - least * ranks]
            held[start : start + ranks] = [b - a + least for a, b in itertools.pairwise(ends)]


def _homes(draw: random.Random, groups: int) -> list[list[Any]]:
    """[expert, group, part of its tokens]: every group has an expert, some experts have copies."""
    first = draw.sample(range(EXPERTS), groups)
    homes = []
    for expert in range(EXPERTS):
        others = [g for g in range(groups) if draw.random() < 0.2]
        mine = sorted({first.index(expert) if expert in first else draw.randrange(groups), *others})
        parts = [draw.random() + 0.01 for _ in mine]
        homes += [[expert, g, p / sum(parts)] for g, p in zip(mine, parts, strict=True)]
    return homes


def write_plan(folder: Path, plan: dict[str, Any], dtype: torch.dtype, one_expert: bool, chunks: int) -> dict[str, Any]:
    """Writes the engine of a plan of the small model -> the manifest's "placement"."""
    return write_engine(folder, model(dtype, one_expert)[0], plan, chunks)[0]


def write_engine(
    folder: Path, captured: Captured, plan: dict[str, Any], chunks: int
) -> tuple[dict[str, Any], tuple[dict[str, Ledger], ...]]:
    """Writes the engine of a plan, without kernels of its own -> the manifest's "placement", and each rank's ledgers.

    captured: after the passes that placement needs.
    """
    shares = [rank_shares(plan, r) for r in range(num_ranks(plan))]
    placed = place(captured.graph_module, shares, chunks)
    placed = finish(placed, AFTER, [PassContext(read=captured.read)] * len(shares))
    options = dataclasses.replace(CompileOptions.of("cpu", None, "off", None), level=None)
    lowered = [lower_rank(captured, graph, options) for graph in placed.graphs]
    record = placement_record(placed, plan, captured.info.caches)
    placement = Placement(plan, record, record["replicas"])
    export_engine(folder, captured, lowered, Target(), Report({}, {}, (), ()), placement=placement)
    return record, placed.ledgers


def random_lanes(draw: random.Random, lanes: int) -> list[list[list[int]]]:
    """Prompts of each lane; some lanes have none."""
    out = []
    for _ in range(lanes):
        prompts = 0 if lanes > 1 and draw.random() < 0.3 else draw.randint(1, 4)
        out.append([[draw.randrange(WORDS) for _ in range(draw.randint(1, 6))] for _ in range(prompts)])
    return out
