"""Families with sparse attention: the library's answers on prompts where the choice of tokens matters."""

import functools
import math

import pytest
import torch
from family_table import family_config
from serve import greedy_batched, greedy_single, relative_error
from zoo import build, greedy, prompts

from moec.compiler.capture import capture
from moec.compiler.capture.captured import Captured
from moec.compiler.capture.indexer import IndexKeys
from moec.compiler.capture.masks import MaskMeaning
from moec.compiler.errors import UnsupportedModel

pytestmark = pytest.mark.null
STEPS = 4
# float32 sums taken in another order than the library's; measured at most 3e-6
REL_TOLERANCE = 1e-5
END = 100
TWO = {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]}
INDEXED = {**TWO, "layer_types": ["indexed_attention"] * 2}
FAMILIES = {  # two layers of each are enough: one chooses, and where layers share a choice, the next one reuses it
    "deepseek_v32": INDEXED,
    "glm_moe_dsa": {**INDEXED, "indexer_types": ["full", "shared"]},
    "hy_v4": {**INDEXED, "indexer_types": ["full", "shared"]},
    "minimax_m3_vl_text": {
        **TWO,
        "mlp_layer_types": ["sparse"] * 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
    },
    "deepseek_v4": {
        "num_hidden_layers": 2,
        "mlp_layer_types": ["hash_moe", "moe"],
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
    },
    "qwen4_exp_text": {  # with embeddings of n-grams, which end tokens cut
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "indexed_attention"],
        "ple_layer_ids": [1],
        "eos_token_id": END,
    },
}
CHOOSERS = (torch.ops.moec.index_topk.default, torch.ops.moec.index_blocks.default)


@functools.cache
def model_of(model_type: str) -> torch.nn.Module:
    model = build(family_config(model_type, **FAMILIES[model_type]))
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):  # DeepSeek-V4's experts by token; zeros in a new model
            table.copy_(torch.rand(len(table), 8, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :2])
    model.generation_config.eos_token_id = None  # all steps are taken
    return model


def asked() -> list[list[int]]:
    """Prompts with end tokens in some."""
    found = prompts()
    found[1][4] = found[1][9] = found[3][0] = END
    return found


@functools.cache
def captured_of(model_type: str) -> Captured:
    return capture(model_of(model_type))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_answers_as_generate_does(model_type: str) -> None:
    captured, model = captured_of(model_type), model_of(model_type)
    expected = [greedy(model, p, STEPS) for p in asked()]
    tokens, logits = greedy_batched(captured, asked(), STEPS)
    assert tokens == [t for t, _ in expected]
    assert max(relative_error(a, b) for a, (_, b) in zip(logits, expected, strict=True)) < REL_TOLERANCE
    alone, alone_logits = greedy_single(captured, asked()[1], STEPS)
    assert alone == expected[1][0]
    assert relative_error(alone_logits, expected[1][1]) < REL_TOLERANCE


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_wrong_choice_is_seen(model_type: str) -> None:
    """The test above means something: with the worst tokens in place of the best, the answers are others."""
    graph = captured_of(model_type).graph_module.graph
    choosers = [n for target in CHOOSERS for n in graph.find_nodes(op="call_function", target=target)]
    assert choosers
    changed = []
    for node in choosers:
        turned = node.args[2] if node.target is CHOOSERS[0] else node.args[0]  # weights of the heads, else queries
        with graph.inserting_before(node):
            negative = graph.call_function(torch.ops.aten.neg.default, (turned,))
        negative.meta.update(turned.meta)
        node.replace_input_with(turned, negative)
        changed.append((node, turned, negative))
    _, logits = greedy_batched(captured_of(model_type), asked()[1:2], 1)
    for node, turned, negative in changed:
        node.replace_input_with(negative, turned)
        graph.erase_node(negative)
    _, expected = greedy(model_of(model_type), asked()[1], 1)
    assert relative_error(logits[0], expected) > 100 * REL_TOLERANCE


def test_layers_that_share_a_choice_have_one_indexer() -> None:
    captured = captured_of("glm_moe_dsa")
    (chooser,) = captured.graph_module.graph.find_nodes(op="call_function", target=CHOOSERS[0])
    attentions = captured.graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.moec.sparse_latent_attention.default
    )
    assert len(attentions) == 2 and chooser.meta["layer"] == 0
    assert [(c.layer, c.name) for c in captured.info.caches] == [
        (0, "cache_0_a"), (0, "cache_0_b"), (0, "cache_0_c"), (1, "cache_1_a"), (1, "cache_1_b"),
    ]  # fmt: skip


def test_what_a_compressor_has_not_closed_is_a_state() -> None:
    caches = {c.name: (c.kind, c.shape) for c in captured_of("deepseek_v4").info.caches}
    assert [kind for name, (kind, _) in caches.items() if name.startswith("cache_0")].count("state") == 2
    assert {shape for kind, shape in caches.values() if kind == "state"} == {(4, 8), (4, 16)}


def keys(chosen: list | None = None) -> IndexKeys:
    def choose(scores, count):
        if chosen is not None:
            chosen.append((scores.scale, count, tuple(scores.weights.shape)))
        return torch.zeros(5, int(count), dtype=torch.int32)

    return IndexKeys(torch.zeros(5, 8), choose)


def scored(k: IndexKeys, weights: torch.Tensor | None = None):
    q = torch.zeros(1, 5, 3, 8)
    scores = torch.relu(torch.matmul(q, k.transpose(-1, -2).float().unsqueeze(1)) * 0.5)
    return torch.matmul(torch.zeros(1, 5, 1, 3) if weights is None else weights, scores).squeeze(-2)


def test_the_arithmetic_of_an_indexer_is_noted() -> None:
    chosen: list = []
    scores = scored(keys(chosen)).masked_fill(~MaskMeaning(), -math.inf)
    indices = scores.topk(min(4, scores.shape[-1]), dim=-1).indices
    assert indices.shape == (1, 5, 4)
    assert chosen == [(0.5, 4, (1, 5, 1, 3))]


@pytest.mark.parametrize(
    ("compute", "named"),
    [
        (lambda k: torch.softmax(torch.matmul(torch.zeros(1, 5, 3, 8), k), -1), "softmax"),
        (lambda k: torch.relu(torch.matmul(torch.zeros(1, 5, 3, 8), k)) * 2.0, "multiplication by 2.0"),
        (lambda k: torch.matmul(torch.zeros(1, 5, 3, 8), k) * -1.0, "multiplication by -1.0"),
        (lambda k: scored(k).topk(4), "topk of unfinished scores"),
        (lambda k: scored(k).masked_fill(~MaskMeaning(window=4), -math.inf), "a mask"),
        (lambda k: scored(k, torch.zeros(1, 5, 1, 3, dtype=torch.bfloat16)), "a second product"),
        (lambda k: k.mean(1), "mean"),
        (lambda k: k.transpose(0, 1), "transpose"),
        (lambda k: torch.cat([k, k]), "cat"),
    ],
)
def test_other_arithmetic_is_refused_by_name(compute, named) -> None:
    with pytest.raises(UnsupportedModel, match=f"indexer computes .*{named}"):
        compute(keys())
