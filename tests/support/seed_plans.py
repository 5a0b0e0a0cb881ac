"""The seed models under the plans that the planner chooses for them at full size, with narrow and few layers.

Narrow: a unit of every share keeps its number and loses its width: heads of 8 values, FFN blocks of one column where
the plan's were 16 or more. What makes a split uneven stays: 36 heads, 60 or 4 experts, 65,532 words.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from typing import Any

import torch
from transformers import MixtralForCausalLM

from moec.compiler.families.catalogue import family_of
from moec.compiler.plan.api import plan
from moec.compiler.zoo import zoo_config

HEAD_DIM = 8
PLACES = tuple((mesh, weights) for mesh in ("rtx4090x8", "h100x8") for weights in ("bf16", "fp8", "int4"))
"""Where each model is planned: the first mesh and format in which it fits."""


@dataclasses.dataclass(frozen=True)
class SeedPlan:
    """document: the plan, cut down. config: of the model that it is for. real: the plan's strategy, mesh and format."""

    document: dict[str, Any]
    config: Any
    real: str

    def model(self) -> torch.nn.Module:
        """With random weights, in float32."""
        torch.manual_seed(0)
        family = family_of(self.config.model_type)
        return (family.model if family else MixtralForCausalLM)(self.config).eval().float()


def seed_plan(name: str) -> SeedPlan:
    """The plan of a zoo model for requests of 512 and 512 tokens, and the small model that it is applied to."""
    for mesh, weights in PLACES:
        made = plan(f"zoo:{name}", mesh, weights, prompt_len=512, gen_len=512)
        if made.feasible:
            break
    else:
        raise ValueError(f"{name} fits none of {PLACES}")
    whole = json.loads(json.dumps(made.document))
    real = f"{whole['strategy']} on {mesh} in {weights}"
    kept = _kept_layers(whole["cuts"])
    small = _cut_down(whole, kept)
    return SeedPlan(small, _narrow_config(name, small, len(kept)), real)


def _kept_layers(cuts: list[int]) -> list[int]:
    """The first layers of every stage: two of the first and of stages that are few, else one."""
    depth = 2 if len(cuts) <= 3 else 1
    return [i for s in range(len(cuts) - 1) for i in range(cuts[s], min(cuts[s] + (depth if s else 2), cuts[s + 1]))]


def _cut_down(whole: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """The plan for some of its layers, FFN units narrowed by what all have in common."""
    small = copy.deepcopy(whole)
    starts = [0]
    for one in whole["units"]:
        starts.append(starts[-1] + one["layers"])
    counts = [sum(a <= i < b for i in kept) for a, b in itertools.pairwise(starts)]
    small["layers"] = [whole["layers"][i] for i in kept]
    small["cuts"] = [sum(i < cut for i in kept) for cut in whole["cuts"]]
    widths = [u[kind]["width"] for u in whole["units"] for kind in ("dense", "expert") if kind in u]
    for count, units, kind in zip(counts, small["units"], small["model"]["layers"], strict=True):
        units["layers"] = kind["count"] = count
        for part in ("dense", "expert"):
            if part in units:
                units[part]["width"] //= math.gcd(*widths)
    return small


def _narrow_config(name: str, small: dict[str, Any], layers: int) -> Any:
    """The model's configuration with the widths of the plan's units."""
    config = zoo_config(name)
    config.num_hidden_layers, config.dtype = layers, torch.float32
    config.hidden_size = HEAD_DIM * config.num_attention_heads
    columns = {
        p: u[p]["units"] * u[p]["width"] for u in reversed(small["units"]) for p in ("dense", "expert") if p in u
    }
    if hasattr(config, "moe_intermediate_size"):
        config.intermediate_size, config.moe_intermediate_size = columns["dense"], columns["expert"]
    else:
        config.intermediate_size = columns["expert"]
    return config
