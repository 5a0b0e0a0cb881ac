"""Graphs placed under a named strategy, for the tests of placement, lowering and export."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from passing import family_case
from torch.fx import GraphModule
from transformers import MixtralConfig, MixtralForCausalLM
from zoo import tiny

from moec.compiler.capture import capture
from moec.compiler.capture.captured import Captured
from moec.compiler.plan.api import plan
from moec.compiler.plan.config import shape_from_config
from moec.passes.infra.base import PassContext
from moec.passes.infra.runner import run_passes
from moec.passes.pipeline import PIPELINE
from moec.passes.placement.rank_shares import num_ranks, rank_shares
from moec.passes.placement.strategy import parse_strategy
from moec.passes.placing.place import Placed, place

BEFORE_PLACE = [p.name for p in PIPELINE].index("fuse-gate-up") + 1


@functools.cache
def uneven_model() -> tuple[Captured, dict[str, Any]]:
    """6 heads, 5 experts of width 48, 3 layers and 131 words: nothing divides by 4."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=48, intermediate_size=48, num_hidden_layers=3, num_attention_heads=6, vocab_size=131
    )
    config.num_key_value_heads, config.num_local_experts = 6, 5
    captured = capture(MixtralForCausalLM(config).eval())
    run_passes(captured.graph_module, PIPELINE[:BEFORE_PLACE], PassContext(read=captured.read), evidence="off")
    return captured, config.to_dict()


@functools.cache
def prepared_family(family: str) -> tuple[GraphModule, Any, dict[str, Any]]:
    """A tiny family's graph as placement gets it, where its weights come from, and its configuration."""
    case = family_case(family)
    run_passes(case.gm, PIPELINE[:BEFORE_PLACE], PassContext(read=case.read), evidence="off")
    return case.gm, case.read, tiny(family).to_dict()


def document(config: dict[str, Any], strategy: str) -> dict[str, Any]:
    """plan.json of a model under one strategy, as it is read from disk."""
    mesh = f"h100x{parse_strategy(strategy).num_ranks}"
    made = plan(shape_from_config(config, "tiny"), mesh, "bf16", prompt_len=8, gen_len=8, strategy=strategy)
    return json.loads(json.dumps(made.document))


def placed(gm: GraphModule, config: dict[str, Any], strategy: str, chunks: int = 1) -> Placed:
    """One graph per rank; `gm` is left alone."""
    made = document(config, strategy)
    return place(gm, [rank_shares(made, r) for r in range(num_ranks(made))], chunks)
