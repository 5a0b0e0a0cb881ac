"""All 15 families, from a directory in the published checkpoint layout: the graph's form, and its answers."""

import functools
from pathlib import Path

import pytest
import torch
from serve import greedy_batched, greedy_single, new_caches, relative_error
from transformers import AutoConfig
from zoo import BASE, TINY, build, greedy, model_of, prompts, save, tiny

from moec.compiler.capture import capture, own_methods
from moec.compiler.capture.activations import ACTIVATION
from moec.compiler.capture.captured import Captured
from moec.compiler.capture.functional import writes_in_place
from moec.compiler.errors import UnsupportedModel
from moec.passes.infra.rewrite import argument
from moec.passes.ir.evaluate import evaluate
from moec.passes.ir.weights import weights_of

STEPS = 4
# float32 sums taken in another order than the library's; measured at most 1.2e-6
REL_TOLERANCE = 1e-5
LATENT = {"deepseek_v2", "deepseek_v3"}


@pytest.fixture(scope="module")
def captured_of(tmp_path_factory):
    """model_type -> what capture gives for its directory, made once."""

    @functools.cache
    def make(model_type: str) -> Captured:
        return capture(save(model_of(model_type), tmp_path_factory.mktemp(model_type)))

    return make


@pytest.mark.null
@pytest.mark.parametrize("model_type", TINY)
def test_answers_as_generate_does(model_type, captured_of):
    captured, model = captured_of(model_type), model_of(model_type)
    expected = [greedy(model, p, STEPS) for p in prompts()]
    tokens, logits = greedy_batched(captured, prompts(), STEPS)
    assert tokens == [t for t, _ in expected]
    assert max(relative_error(a, b) for a, (_, b) in zip(logits, expected, strict=True)) < REL_TOLERANCE
    for prompt, (wanted, wanted_logits) in zip(prompts(), expected, strict=True):
        alone, alone_logits = greedy_single(captured, prompt, STEPS)
        assert alone == wanted
        assert relative_error(alone_logits, wanted_logits) < REL_TOLERANCE


@pytest.mark.null
@pytest.mark.parametrize("model_type", TINY)
def test_graph_keeps_the_contract(model_type, captured_of):
    captured = captured_of(model_type)
    gm = captured.graph_module
    names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    layers = captured.info.layers
    assert names == ["tokens", "positions", "slots", *(f"cache_{i}_{x}" for i in range(layers) for x in "ab")]
    assert sorted(captured.symbols.values()) == ["L", "N", "T"]
    assert isinstance(gm.graph.output_node().args[0], torch.fx.Node)
    for node in gm.graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output")
        assert node.op == "output" or ("val" in node.meta and "layer" in node.meta), node.name
        assert not writes_in_place(node), node.name
        if node.target in (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten.expand.default):
            assert all(not isinstance(s, int) or s >= 0 for s in node.args[1]), node.name
    attributes = {str(n.target) for n in gm.graph.find_nodes(op="get_attr")}
    assert attributes == set(weights_of(gm))
    assert all(getattr(gm, a).is_meta for a in attributes)
    targets = {str(n.target) for n in gm.graph.nodes}
    attention = "moec.latent_attention.default" if model_type in LATENT else "moec.cached_attention.default"
    assert attention in targets
    assert ("moec.experts.default" in targets) == (model_type != "llama4_text")  # its dense bmm is lifted by a pass
    assert "aten.linear.default" in targets
    assert {n.meta["layer"] for n in gm.graph.nodes if "layer" in n.meta} == {None, *range(layers)}


@pytest.mark.null
@pytest.mark.parametrize("model_type", TINY)
def test_takes_no_tokens(model_type, captured_of):
    captured = captured_of(model_type)
    none = torch.zeros(0, dtype=torch.long)
    caches = new_caches(captured, 2, 4)
    logits = evaluate(captured.graph_module, [none, none, none, *caches], captured.read)
    assert logits.shape == (0, captured.info.vocab_size)
    assert all(not c.any() for c in caches)


@pytest.mark.null
@pytest.mark.parametrize("model_type", TINY)
def test_weights_of_a_directory_equal_the_model(model_type, captured_of):
    captured, model = captured_of(model_type), model_of(model_type)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    by_attribute = {name.replace(".", "_"): t for name, t in tensors.items()}
    weights = weights_of(captured.graph_module)
    assert weights.keys() <= by_attribute.keys()
    for attribute, weight in weights.items():
        found = weight.materialise(captured.read)
        assert found.dtype == by_attribute[attribute].dtype
        assert torch.equal(found, by_attribute[attribute]), attribute


@pytest.mark.null
def test_moe_layers(captured_of):
    assert captured_of("mixtral").moe_layers == (0, 1, 2)
    assert captured_of("deepseek_v3").moe_layers == (1, 2)
    assert captured_of("llama4_text").moe_layers == (1, 3)


@pytest.mark.null
def test_in_memory_gives_the_same_graph_and_leaves_the_model_alone(captured_of):
    model = build(tiny("gpt_oss"))
    before = (model.config._attn_implementation, model.config._experts_implementation, sorted(model.__dict__))
    captured = capture(model)
    assert str(captured.graph_module.graph) == str(captured_of("gpt_oss").graph_module.graph)
    assert (model.config._attn_implementation, model.config._experts_implementation, sorted(model.__dict__)) == before
    assert not any(ACTIVATION in m.__dict__ for m in model.modules())
    assert greedy(model, prompts()[0], 2)[0] == greedy(model_of("gpt_oss"), prompts()[0], 2)[0]


@pytest.mark.null
def test_as_many_nodes_with_64_experts_as_with_8(captured_of):
    many = capture(build(tiny("qwen3_moe", num_experts=64)))
    assert len(many.graph_module.graph.nodes) == len(captured_of("qwen3_moe").graph_module.graph.nodes)


@pytest.mark.null
def test_windows_and_sinks_come_from_the_model(captured_of):
    graph = captured_of("gpt_oss").graph_module.graph
    calls = graph.find_nodes(op="call_function", target=torch.ops.moec.cached_attention.default)
    assert [argument(c, 9, "window", 0) for c in calls] == [8, 0, 8]
    assert all(c.args[7].op == "get_attr" for c in calls)
    graph = captured_of("llama4_text").graph_module.graph
    calls = graph.find_nodes(op="call_function", target=torch.ops.moec.cached_attention.default)
    assert [argument(c, 10, "chunk", 0) for c in calls] == [8, 8, 8, 0]


@pytest.mark.null
def test_tied_embeddings_share_a_weight():
    captured = capture(build(tiny("mixtral", tie_word_embeddings=True)))
    graph = captured.graph_module.graph
    *_, head = graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    (embedding,) = graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
    assert head.args[1].target == embedding.args[0].target


@pytest.mark.null
def test_tied_embeddings_from_a_directory(tmp_path: Path):
    model = build(tiny("mixtral", tie_word_embeddings=True))
    captured = capture(save(model, tmp_path))
    expected = greedy(model, prompts()[0], 2)
    assert greedy_single(captured, prompts()[0], 2)[0] == expected[0]


@pytest.mark.null
def test_info(captured_of):
    info = captured_of("deepseek_v3").info
    assert (info.model_type, info.vocab_size, info.hidden, info.layers) == ("deepseek_v3", 128, 32, 3)
    assert info.max_positions == 256
    assert [c.shape for c in info.caches] == [(20,), (8,)] * 3
    assert info.kv_bytes_per_token == 3 * 28 * 4
    assert info.config["n_routed_experts"] == 8


@pytest.mark.null
def test_a_branch_on_one_token_is_refused(monkeypatch):
    model = build(tiny("mixtral"))
    block = type(model.model.layers[0].mlp)
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, h: h * 2 if h.shape[1] == 1 else forward(self, h))
    with pytest.raises(UnsupportedModel, match="some size of a token dimension specially"):
        capture(model)


@pytest.mark.null
def test_blocks_of_plain_python_are_lifted_in_memory(monkeypatch):
    monkeypatch.setattr(own_methods, "CLASSES", {})  # as if the library had a new family that loops over experts
    config = AutoConfig.for_model(
        "dbrx",
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=256,
        vocab_size=128,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
    )
    model = build(config)
    captured = capture(model)
    assert [c["site"] for c in captured.certificates] == ["transformer.blocks.0.ffn", "transformer.blocks.1.ffn"]
    expected = [greedy(model, p, STEPS) for p in prompts()]
    tokens, logits = greedy_batched(captured, prompts(), STEPS)
    assert tokens == [t for t, _ in expected]
    assert max(relative_error(a, b) for a, (_, b) in zip(logits, expected, strict=True)) < REL_TOLERANCE


@pytest.mark.null
def test_sizes_that_depend_on_values_are_refused(monkeypatch):
    monkeypatch.setattr(own_methods, "CLASSES", {})
    model = build(AutoConfig.for_model("jetmoe", **BASE, num_local_experts=4, num_experts_per_tok=2, kv_channels=8))
    with pytest.raises(UnsupportedModel, match="depends on the values of tensors"):
        capture(model)
