"""Layers with a state (convolutions, recurrences): captured, compiled, and compared with the library's own answers."""

import pytest
import torch
from family_table import family_config
from serve import Server, greedy_batched, greedy_single, relative_error
from zoo import build, greedy, prompts, save

import moec
from moec.compiler.capture import capture
from moec.compiler.capture.context import Context
from moec.compiler.capture.seams import CaptureCache, cache_for
from moec.compiler.capture.states import state_read, state_write
from moec.compiler.errors import UnsupportedModel
from moec.passes.ir.evaluate import evaluate
from moec.passes.ir.text import graph_text

STEPS = 6
# float32 sums taken in another order than the library's; measured at most 4e-6
REL_TOLERANCE = 1e-5
FAMILIES = ("lfm2_moe", "jamba", "minimax")  # windows alone; a window and a recurrence; a cache class of its own


@pytest.fixture(scope="module")
def models():
    return {name: build(family_config(name)) for name in FAMILIES}


@pytest.fixture(scope="module")
def graphs(models, tmp_path_factory):
    return {name: capture(save(model, tmp_path_factory.mktemp(name))) for name, model in models.items()}


@pytest.fixture(scope="module")
def engine(models):
    return moec.compile(models["jamba"], verify="sampled")


def sequence(length=11):
    return torch.randint(2, 128, (length,), generator=torch.Generator().manual_seed(4)).tolist()


def expected(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


@pytest.mark.null
@pytest.mark.parametrize("name", FAMILIES)
def test_the_captured_graph_answers_as_generate_does(name, models, graphs):
    captured = graphs[name]
    wanted = [greedy(models[name], p, STEPS) for p in prompts()]
    tokens, logits = greedy_batched(captured, prompts(), STEPS)
    assert tokens == [t for t, _ in wanted]
    assert max(relative_error(a, b) for a, (_, b) in zip(logits, wanted, strict=True)) < REL_TOLERANCE
    alone, alone_logits = greedy_single(captured, prompts()[1], STEPS)
    assert alone == wanted[1][0]
    assert relative_error(alone_logits, wanted[1][1]) < REL_TOLERANCE


@pytest.mark.null
@pytest.mark.parametrize("name", FAMILIES)
def test_no_token_changes_no_state(name, graphs):
    captured = graphs[name]
    server = Server(captured, 2, 8)
    server.step([(1, 0, sequence(4))])
    before = [c.clone() for c in server.caches]
    none = torch.zeros(0, dtype=torch.long)
    assert evaluate(captured.graph_module, [none, none, none, *server.caches], captured.read).shape == (0, 128)
    assert all(torch.equal(a, b) for a, b in zip(server.caches, before, strict=True))


@pytest.mark.null
def test_what_layers_keep(graphs):
    info = graphs["jamba"].info
    kinds = [(c.name, c.kind, c.shape) for c in info.caches if c.layer < 2]
    assert kinds == [
        ("cache_0_a", "state", (64, 4)),
        ("cache_0_b", "state", (64, 8)),
        ("cache_1_a", "tokens", (2, 8)),
        ("cache_1_b", "tokens", (2, 8)),
    ]
    assert info.kv_bytes_per_token == 2 * 2 * 16 * 4
    assert info.state_bytes_per_sequence == 2 * 64 * (4 + 8) * 4


@pytest.mark.null
def test_copied_layers_equal_traced_ones():
    """Twelve layers of four kinds: those that are not traced give the library's logits too."""
    model = build(family_config("jamba", num_hidden_layers=12))
    captured = capture(model)
    calls = captured.graph_module.graph.find_nodes(op="call_function", target=torch.ops.moec.recurrence.default)
    assert [n.meta["layer"] for n in calls] == [0, 2, 4, 6, 8, 10]
    assert len({n.args[4] for n in calls}) == 1
    found = Server(captured, 1, 11).step([(0, 0, sequence())])
    assert relative_error(found[0], expected(model, sequence())[-1]) < REL_TOLERANCE


@pytest.mark.null
def test_golden(graphs, golden):
    lines = graph_text(graphs["jamba"].graph_module).splitlines()
    golden(
        "jamba", "\n".join(line for line in lines if "moec.shift_window" in line or "moec.recurrence" in line) + "\n"
    )


@pytest.mark.cpu
@pytest.mark.parametrize("parts", [(11,), (1, 10), (4, 1, 1, 5), (1,) * 11])
def test_a_prompt_in_parts(parts, engine, models):
    """Several tokens at once continue a sequence as rightly as they begin one."""
    cache, tokens, rows = engine.new_cache(1, 16), sequence(), []
    slot = cache.allocate()
    for part in parts:
        rows.append(engine.step(cache, [slot], [tokens[:part]]).clone())
        tokens = tokens[part:]
    ends = torch.tensor(parts).cumsum(0) - 1
    assert relative_error(torch.cat(rows), expected(models["jamba"], sequence())[ends]) < REL_TOLERANCE


@pytest.mark.cpu
def test_a_slot_that_is_used_again_starts_empty(engine):
    cache = engine.new_cache(2, 16)
    first = cache.allocate()
    fresh = engine.step(cache, [first], [sequence()]).clone()
    cache.release(first)
    again = cache.allocate()
    assert again == first
    assert torch.equal(engine.step(cache, [again], [sequence()]), fresh)


@pytest.mark.cpu
def test_sequences_do_not_disturb_each_other(engine, models):
    """Prompts of several sizes and single tokens in one step, slots in changing order."""
    cache = engine.new_cache(3, 32)
    slots = [cache.allocate() for _ in range(3)]
    texts = [sequence(12), sequence(9)[::-1], sequence(10)[3:] + sequence(4)]
    wanted = [expected(models["jamba"], t) for t in texts]
    done = [0, 0, 0]
    for order, counts in [
        ([2, 0], [3, 5]),
        ([1], [4]),
        ([0, 2, 1], [1, 1, 1]),
        ([1, 0], [1, 4]),
        ([2, 1, 0], [1, 2, 1]),
    ]:
        fed = [texts[i][done[i] : done[i] + n] for i, n in zip(order, counts, strict=True)]
        rows = engine.step(cache, [slots[i] for i in order], fed)
        for row, i, n in zip(rows, order, counts, strict=True):
            done[i] += n
            assert relative_error(row, wanted[i][done[i] - 1]) < REL_TOLERANCE


@pytest.mark.cpu
def test_an_engine_with_states_is_saved_and_loaded(engine, tmp_path):
    engine.save(tmp_path / "engine")
    loaded = moec.load(tmp_path / "engine")
    assert loaded.generate([sequence(5)], max_new_tokens=4) == engine.generate([sequence(5)], max_new_tokens=4)
    assert loaded.inspect()["state_bytes_per_sequence"] == 6144
    assert engine.verify()["passed"]


def context(tokens=3, caches=None):
    places = torch.arange(tokens)
    return Context(places, torch.zeros_like(places), caches)


@pytest.mark.null
def test_what_is_read_can_be_written():
    state, slots = torch.zeros(3, 2), torch.tensor([2, 0])
    state_write(state, slots, torch.ones(2, 2))
    assert torch.equal(state_read(state, torch.tensor([0, 1, 2])), torch.tensor([[1.0, 1], [0, 0], [1, 1]]))


@pytest.mark.null
def test_a_cache_class_of_its_own_is_one(models):
    assert cache_for(models["minimax"])(context()).get_linear_cache(1) is None
    assert issubclass(cache_for(models["minimax"]), CaptureCache)
    assert cache_for(models["jamba"]).__mro__[1] is CaptureCache


@pytest.mark.null
def test_a_state_that_grows_is_refused(models, monkeypatch):
    """A state must have one size; one with an entry for each token is none."""
    mixer = type(models["lfm2_moe"].model.layers[0].conv)
    forward = mixer.forward

    def growing(self, hidden_states, past_key_values=None, **rest):
        past_key_values.update_recurrent_state(hidden_states.expand(hidden_states.shape[0], -1, -1), self.layer_idx)
        return forward(self, hidden_states, past_key_values=past_key_values, **rest)

    monkeypatch.setattr(mixer, "forward", growing)
    with pytest.raises(UnsupportedModel, match="the size of its state recurrent0 depends on the number of tokens"):
        capture(models["lfm2_moe"])
