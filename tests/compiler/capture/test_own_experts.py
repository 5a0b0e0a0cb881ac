"""Experts modules that loop over their experts: captured from directories, with the library's answers."""

import pytest
import torch
from family_table import family_config
from serve import greedy_batched, greedy_single, relative_error
from zoo import build, greedy, prompts, save

from moec.compiler.capture import capture

STEPS = 4
# float32 sums taken in another order than the library's; measured at most 1.2e-6
REL_TOLERANCE = 1e-5


@pytest.mark.null
@pytest.mark.parametrize("model_type", ["longcat_flash", "jetmoe", "dbrx"])
def test_answers_as_generate_does(model_type, tmp_path):
    model = build(family_config(model_type))
    captured = capture(save(model, tmp_path))
    assert not captured.certificates
    calls = captured.graph_module.graph.find_nodes(op="call_function", target=torch.ops.moec.experts.default)
    assert len(calls) == 4
    expected = [greedy(model, p, STEPS) for p in prompts()]
    tokens, logits = greedy_batched(captured, prompts(), STEPS)
    assert tokens == [t for t, _ in expected]
    assert max(relative_error(a, b) for a, (_, b) in zip(logits, expected, strict=True)) < REL_TOLERANCE
    alone, alone_logits = greedy_single(captured, prompts()[1], STEPS)
    assert alone == expected[1][0]
    assert relative_error(alone_logits, expected[1][1]) < REL_TOLERANCE


@pytest.mark.null
def test_tokens_choose_zero_experts():
    """The test above means something: most tokens are sent to a zero expert, some to two of them."""
    model = build(family_config("longcat_flash"))
    seen = []
    for block in model.model.layers:
        block.mlp.router.register_forward_hook(lambda _, __, out: seen.append(out[2]))
    greedy(model, prompts()[1], 2)
    zero = torch.cat(seen) >= 8
    assert zero.any() and not zero.all()
