"""Every zoo model, shrunk, from a checkpoint with its published names to the engine's answers and choice of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from routing import record, recorded
from safetensors import safe_open
from serve import relative_error
from zoo import build, greedy, save

import moec
from moec.compiler.capture.configuration import parse_config
from moec.compiler.zoo import ZOO

pytestmark = pytest.mark.cpu
STEPS = 32
LENGTHS = (7, 1, 12)
REL_TOLERANCE = 1e-5  # float32 sums in another order
# widths that run here; heads, experts, top-k, shared experts and every constant are (in proportion) the model's own
SHRUNK: dict[str, dict[str, int]] = {
    "skywork-moe": {"vocab_size": 83, "hidden_size": 72, "intermediate_size": 96, "num_attention_heads": 9,
                    "num_key_value_heads": 9},
    "apus-xdan-4.0": {"vocab_size": 80, "hidden_size": 56, "intermediate_size": 160, "num_attention_heads": 7,
                      "num_key_value_heads": 1},
    "deepseek-moe-16b": {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 88, "moe_intermediate_size": 12,
                         "num_attention_heads": 4, "num_key_value_heads": 4},
    "deepseek-moe-145b": {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 88, "moe_intermediate_size": 12,
                          "num_attention_heads": 4, "num_key_value_heads": 4},
    "xverse-moe-a4.2b": {"vocab_size": 94, "hidden_size": 40, "intermediate_size": 28, "num_attention_heads": 4},
    "xverse-moe-a36b": {"vocab_size": 94, "hidden_size": 48, "intermediate_size": 32, "num_attention_heads": 6,
                        "num_key_value_heads": 2},
    "mixtral-8x7b": {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 112, "num_attention_heads": 4,
                     "num_key_value_heads": 1},
    "mixtral-8x22b": {"vocab_size": 82, "hidden_size": 48, "intermediate_size": 128, "num_attention_heads": 6,
                      "num_key_value_heads": 1},
    "grok-1": {"vocab_size": 88, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6,
               "num_key_value_heads": 1},
}  # fmt: skip
FAST = ("skywork-moe", "deepseek-moe-16b", "grok-1")
PROJECTIONS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
W123 = ("w1.weight", "w2.weight", "w3.weight")


def shrunk(name: str) -> dict[str, Any]:
    """config.json of a small one: two layers with experts, and the dense one before them where the model has one."""
    layers = 3 if name.startswith("deepseek") else 2
    return {
        **ZOO[name], **SHRUNK[name], "num_hidden_layers": layers, "max_position_embeddings": 128, "dtype": "float32",
        "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip


def published(name: str, experts: int, layers: int) -> set[str]:
    """The tensors of its published checkpoint, by the model facts (vLLM, SGLang and converter loaders)."""
    llama = [f"self_attn.{p}_proj.weight" for p in "qkvo"]
    llama += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    dense: list[str] = []
    if name.startswith("grok"):
        layer = [f"attn.{p}_proj.weight" for p in "qkvo"] + ["moe_block.gate.weight"]
        layer += [f"{when}_{what}_norm.scale" for when in ("pre", "post") for what in ("attn", "moe")]
        layer += [
            f"moe_block.experts.{e}.{p}.weight" for e in range(experts) for p in ("linear", "linear_v", "linear_1")
        ]
    elif name.startswith(("deepseek", "xverse")):
        layer = [*llama, "mlp.router.weight" if name.startswith("xverse") else "mlp.gate.weight"]
        layer += [f"mlp.shared_experts.{p}" for p in PROJECTIONS]
        layer += [f"mlp.experts.{e}.{p}" for e in range(experts) for p in PROJECTIONS]
        dense = [*llama, *(f"mlp.{p}" for p in PROJECTIONS)] if name.startswith("deepseek") else []
    else:
        layer = [*llama, "block_sparse_moe.gate.weight"]
        layer += [f"block_sparse_moe.experts.{e}.{p}" for e in range(experts) for p in W123]
    ends = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    if name.startswith("grok"):
        ends = ["model.embed_tokens.weight", "model.norm.scale"]  # one matrix for both ends
    body = [f"model.layers.{i}.{n}" for i in range(layers) for n in (dense if dense and i == 0 else layer)]
    return {*ends, *body}


def num_experts(config: Any) -> int:
    return int(
        next(n for k in ("num_local_experts", "n_routed_experts", "num_experts") if (n := getattr(config, k, 0)))
    )


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ZOO])
def test_checkpoint_to_answers(name: str, tmp_path: Path) -> None:
    raw = shrunk(name)
    config = parse_config(dict(raw), name)
    config._attn_implementation = config._experts_implementation = "eager"
    model = build(config)
    directory = save(model, tmp_path / "model")
    (directory / "config.json").write_text(json.dumps(raw))
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert set(file.keys()) == published(name, num_experts(config), raw["num_hidden_layers"])
    top_k = getattr(config, "moe_top_k", None) or config.num_experts_per_tok
    engine = moec.compile(directory, output=tmp_path / "engine")
    recorder = record(engine, top_k)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    expected = [reference(model, p) for p in prompts]
    cache = engine.new_cache(len(prompts), max(LENGTHS) + STEPS)
    fed, slots = [list(p) for p in prompts], list(range(len(prompts)))
    for step in range(STEPS + 1):
        logits = engine.step(cache, slots, fed)
        for i, (tokens, rows, _) in enumerate(expected):
            assert int(logits[i].argmax()) == tokens[step]
            assert relative_error(logits[i], rows[step]) < REL_TOLERANCE, (i, step)
        fed = [[tokens[step]] for tokens, _, _ in expected]
    assert {len(call) for call in recorder.chosen} == {len(engine.inspect()["moe_layers"])}
    for i, (_, _, routing) in enumerate(expected):
        for layer, theirs in enumerate(routing):
            assert torch.equal(_of_sequence(recorder.chosen, layer, i), theirs), (i, layer)
    whole = engine(prompts[2])  # the prefill's logits at every position
    with torch.no_grad():
        assert relative_error(whole, model(torch.tensor([prompts[2]])).logits[0]) < REL_TOLERANCE


def reference(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor, list[torch.Tensor]]:
    """STEPS + 1 greedy tokens, their logits, and by layer the experts [tokens that were fed, K] in rising order."""
    with recorded(model) as chosen:
        tokens, logits = greedy(model, prompt, STEPS + 1)
    return tokens, logits, [torch.cat(rows) for rows in chosen]


def _of_sequence(chosen: list[list[torch.Tensor]], layer: int, sequence: int) -> torch.Tensor:
    """The rows of one sequence of what was recorded: of its prompt in the first call, then one of each call."""
    start = sum(LENGTHS[:sequence])
    first = chosen[0][layer][start : start + LENGTHS[sequence]]
    return torch.cat([first, *(call[layer][sequence : sequence + 1] for call in chosen[1 : STEPS + 1])])
