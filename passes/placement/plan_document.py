"""plan.json: a plan as plain data, complete enough for a verifier and a runtime."""

from __future__ import annotations

import math

import numpy as np

from moec.passes.hardware.catalogue import mesh_to_dict
from moec.passes.placement.certificate import certificate, full_load
from moec.passes.placement.cost import StepLoad, StepModel
from moec.passes.placement.layout import MEMORY_UTILISATION, Layout
from moec.passes.placement.place_experts import imbalance
from moec.passes.placement.search import Candidate, PlanRequest, SearchResult, popularity_by_layer, sequences_in_flight

FORMAT_VERSION = 1
PROMPT_TOKENS = 2048
"""Tokens of the prompt-only step that the document states."""


def plan_document(result: SearchResult) -> dict[str, object]:
    """The plan as JSON data; with "feasible": false and the reasons where nothing fits ("proven" where nothing can)."""
    request = result.request
    out: dict[str, object] = {
        "format": "moec-plan",
        "version": FORMAT_VERSION,
        "feasible": result.best is not None,
        "proven": result.best is not None or result.tokens_per_s_bound == 0,
        "model": request.shape.to_dict() | _params(request),
        "mesh": mesh_to_dict(request.mesh),
        "weights": _weights(request),
        "kv_bytes": request.kv_bytes,
        "workload": {
            "prompt_len": request.workload.prompt_len,
            "gen_len": request.workload.gen_len,
            "num_requests": request.workload.num_requests,
            "batch": request.batch,
        },
        "routing": {"source": request.trace.source, "counts": request.trace.counts.tolist()},
        "rejected": [_rejected(c) for c in result.candidates if c is not result.best],
    }
    out["memory"] = {"utilisation": MEMORY_UTILISATION, "reserved_bytes": request.any_problem().reserved_bytes()}
    out["certificate"] = certificate(result)
    return out | (_placed(result, result.best) if result.best else {})


def _placed(result: SearchResult, best: Candidate) -> dict[str, object]:
    request, layout = result.request, best.layout
    if layout is None:
        raise ValueError("the best candidate has no layout")
    popularity = popularity_by_layer(request)
    load = full_load(result, best, best.kv_tokens)
    model = StepModel(layout, request.params, popularity)
    parts = model.parts(load)
    spread = math.exp(request.params.log_error)
    moe = np.array([request.shape.layer_class(i).moe is not None for i in range(request.shape.num_layers)])
    return {
        "strategy": best.strategy.name,
        "cuts": list(layout.cuts),
        "units": _units(layout),
        "ranks": _ranks(layout, best.strategy.replicas),
        "layers": [_layer(layout, i) for i in range(request.shape.num_layers)],
        "embedding": layout.embedding.tolist(),
        "head": layout.head.tolist(),
        "kv_tokens": best.kv_tokens * best.strategy.replicas,
        "sequences": sequences_in_flight(request, best),
        "step_ms": {name: 1e3 * seconds for name, seconds in parts.items()},
        "phases": _phases(model, load, request.workload.prompt_len),
        "tokens_per_s": best.tokens_per_s,
        "tokens_per_s_range": [best.tokens_per_s / spread**2, best.tokens_per_s * spread**2],
        "imbalance": {"mean": float(imbalance(layout.token_share[moe], popularity[moe]).mean())},
    }


def _phases(model: StepModel, load: StepLoad, prompt_len: int) -> dict[str, float]:
    """Milliseconds of one replica's step with decodes only, with prompts only (2048 tokens), and with both as in
    steady state."""
    prompts = StepLoad(0.0, 0.0, PROMPT_TOKENS, prompt_len / 2)
    return {
        "decode_step_ms": 1e3 * model.seconds(StepLoad(load.sequences, load.context)),
        "prefill_step_ms": 1e3 * model.seconds(prompts),
        "prefill_tokens_per_s": model.layout.strategy.replicas * PROMPT_TOKENS / model.seconds(prompts),
        "mixed_step_ms": 1e3 * model.seconds(load),
    }


def _ranks(layout: Layout, replicas: int) -> list[dict[str, object]]:
    weights, cache = layout.weight_bytes(), layout.kv_bytes_per_token()
    num = len(weights)
    group = layout.group_of_rank()
    out = []
    for rank in range(num * replicas):
        r = rank % num
        stage = r // layout.strategy.stage_ranks
        start, end = layout.cuts[stage], layout.cuts[stage + 1]
        resident = layout.resident[start:end, :, group[r]] * (layout.expert_blocks[start:end, r] > 0)[:, None]
        shares = {
            "replica": rank // num,
            "layers": [start, end],
            "attention_units": layout.attention[start:end, r].tolist(),
            "dense_blocks": layout.dense[start:end, r].tolist(),
            "expert_blocks": layout.expert_blocks[start:end, r].tolist(),
            "experts_per_layer": resident.sum(axis=1).tolist(),
            "embedding_rows": int(layout.embedding[r]),
            "head_rows": int(layout.head[r]),
        }
        entry = {"rank": rank, "device": layout.problem.mesh.devices[r].name, "weight_bytes": float(weights[r])}
        out.append(entry | {"kv_bytes_per_token": float(cache[r]), "shares": shares})
    return out


def _layer(layout: Layout, layer: int) -> dict[str, object]:
    out: dict[str, object] = {"attention": layout.attention[layer].tolist(), "dense": layout.dense[layer].tolist()}
    out["replicated"] = layout.in_stage()[layer].astype(int).tolist()
    if layout.problem.shape.layer_class(layer).moe is None:
        return out
    out["experts"] = layout.expert_blocks[layer].tolist()
    experts, groups = np.nonzero(layout.resident[layer])
    out["resident"] = [
        [int(e), int(g), float(layout.token_share[layer, e, g])] for e, g in zip(experts, groups, strict=True)
    ]
    return out


def _units(layout: Layout) -> list[dict[str, object]]:
    """Per layer class: number and size of the units that shares count."""
    out = []
    for class_idx, c in enumerate(layout.problem.shape.layers):
        attention = layout.problem.attention(class_idx, layout.strategy.attention_tp)
        entry: dict[str, object] = {
            "layers": c.count,
            "attention": {"units": attention.num, "query_heads": attention.query_heads_per_unit},
        }
        dense, expert = layout.problem.dense(class_idx), layout.problem.expert(class_idx)
        if dense is not None:
            width = c.dense.width if c.dense else c.moe.shared_width if c.moe else 0
            entry["dense"] = {"units": dense.num, "width": width // dense.num}
        if expert is not None and c.moe is not None:
            entry["expert"] = {"units": expert.num, "width": c.moe.width // expert.num}
        out.append(entry)
    return out


def _weights(request: PlanRequest) -> dict[str, object]:
    w = request.weights
    return {
        "name": w.name,
        "bits": w.bits,
        "groups": list(w.groups),
        "group_scale_bytes": w.group_scale_bytes,
        "channel_scale_bytes": w.channel_scale_bytes,
        "experts_only": w.experts_only,
    }


def _rejected(candidate: Candidate) -> dict[str, object]:
    return {
        "strategy": candidate.strategy.name,
        "reason": candidate.reason,
        "tokens_per_s": candidate.tokens_per_s,
        "tokens_per_s_bound": candidate.tokens_per_s_bound,
    }


def _params(request: PlanRequest) -> dict[str, int]:
    shape = request.shape
    counts = {"total_params": shape.total_params(), "active_params": shape.active_params()}
    return counts | {"matrix_params": _matrix_params(request)}


def _matrix_params(request: PlanRequest) -> int:
    """Parameters of attention, FFN and expert matrices and of one embedding: what units must cover at least."""
    shape, total = request.shape, request.shape.vocab * request.shape.hidden
    for c in shape.layers:
        attention = c.attention.params(shape.hidden) - c.attention.qk_norm_params - c.attention.bias_params
        experts = c.moe.num_experts * (c.moe.params_per_expert(shape.hidden) - c.moe.expert_bias_params) if c.moe else 0
        dense = c.dense.params(shape.hidden) if c.dense else c.moe.shared_params(shape.hidden) if c.moe else 0
        total += c.count * (attention + experts + dense)
    return total
