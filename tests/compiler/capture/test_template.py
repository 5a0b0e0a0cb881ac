"""Deep models from a few traced layers: the same graph and answers as with every layer traced."""

import pytest
from serve import greedy_batched
from zoo import build, greedy, prompts, tiny

from moec.compiler.capture import language_model, transformers
from moec.compiler.capture.kinds import plan_layers
from moec.compiler.capture.tensors import named_tensors, sources_of
from moec.passes.ir.weights import weights_of

pytestmark = pytest.mark.null
DEEP = {
    "mixtral": {},
    "deepseek_v3": {},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"] * 4},
}


def deep(model_type):
    return build(tiny(model_type, num_hidden_layers=8, **DEEP[model_type]))


def every_layer(model):
    tensors = dict(named_tensors(model))
    return transformers.capture_model(model, sources_of(tensors), lambda n: tensors[n].detach(), every_layer=True)


def calls(captured):
    return [(n.target, n.meta["layer"]) for n in captured.graph_module.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    ("model_type", "traced"),
    [("mixtral", (0, 1, 7)), ("deepseek_v3", (0, 1, 2, 7)), ("gpt_oss", (0, 1, 2, 3, 6, 7))],
)
def test_copies_equal_traced_layers(model_type, traced, monkeypatch):
    plans = []
    monkeypatch.setattr(language_model, "plan_layers", lambda *a: plans.append(plan_layers(*a)) or plans[-1])
    model = deep(model_type)
    captured, whole = transformers.capture_in_memory(model), every_layer(model)
    assert plans[0].traced == traced
    assert len(plans) == 1
    assert calls(captured) == calls(whole)
    assert weights_of(captured.graph_module) == weights_of(whole.graph_module)
    assert captured.info == whole.info
    assert captured.moe_layers == whole.moe_layers
    names = [n.name for n in captured.graph_module.graph.find_nodes(op="placeholder")]
    assert names == [n.name for n in whole.graph_module.graph.find_nodes(op="placeholder")]
    tokens, _ = greedy_batched(captured, prompts(), 3)
    assert tokens == [greedy(model, p, 3)[0] for p in prompts()]


def test_a_layer_that_is_secretly_different_is_traced():
    """Alike in every attribute, different in code: the traced samples disagree, so every layer is traced."""
    model = deep("mixtral")
    last = model.model.layers[7].mlp
    forward = last.forward
    object.__setattr__(last, "_hidden_factor", 3.0)
    last.__dict__["forward"] = lambda h: forward(h) * last._hidden_factor
    captured = transformers.capture_in_memory(model)
    assert len({n for _, n in calls(captured)} - {None}) == 8
    tokens, _ = greedy_batched(captured, prompts(), 2)
    assert tokens == [greedy(model, p, 2)[0] for p in prompts()]


def test_no_plan_where_nothing_would_be_saved():
    model = build(tiny("mixtral"))
    exported = language_model.export_language_model(model)
    assert exported.plan is None
    assert exported.traced == exported.caches


def test_the_model_is_put_back():
    model = deep("gpt_oss")
    before = (list(model.model.layers), list(model.config.layer_types), model.config.num_hidden_layers)
    language_model.export_language_model(model)
    after = (list(model.model.layers), list(model.config.layer_types), model.config.num_hidden_layers)
    assert after == before
