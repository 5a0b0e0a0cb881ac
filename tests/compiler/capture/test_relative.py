"""Position biases by distance: Inkling against the library, and what is refused."""

import pytest
import torch
from family_table import family_config
from serve import greedy_batched, greedy_single, relative_error
from torch import nn
from zoo import build, greedy, prompts

from moec.compiler.capture import capture
from moec.compiler.capture.context import Context
from moec.compiler.capture.relative import relative_biases
from moec.compiler.errors import UnsupportedModel

pytestmark = pytest.mark.null
STEPS = 4
TWO_LAYERS = {
    "num_hidden_layers": 2,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "mlp_layer_types": ["sparse", "sparse"],
}
# float32 sums taken in another order than the library's; measured at most 8e-7
REL_TOLERANCE = 1e-5


def test_inkling_answers_as_generate_does():
    """Log-scaled queries, windows and convolutions before and after attention, too."""
    model = build(family_config("inkling_text", **TWO_LAYERS))
    captured = capture(model)
    wanted = [greedy(model, p, STEPS) for p in prompts()]
    tokens, logits = greedy_batched(captured, prompts(), STEPS)
    assert tokens == [t for t, _ in wanted]
    assert max(relative_error(a, b) for a, (_, b) in zip(logits, wanted, strict=True)) < REL_TOLERANCE
    alone, alone_logits = greedy_single(captured, prompts()[1], STEPS)
    assert alone == wanted[1][0]
    assert relative_error(alone_logits, wanted[1][1]) < REL_TOLERANCE


class Bias(nn.Module):
    """states [1, T, heads, D] -> [1, heads, T, keys]; absolute: it depends on more than the distance."""

    rel_extent = 4

    def __init__(self, absolute=0.0):
        super().__init__()
        self.proj, self.absolute = nn.Parameter(torch.randn(3, 4)), absolute

    def forward(self, states, query_positions, key_positions):
        by_distance = (states @ self.proj).transpose(1, 2)
        back = query_positions[:, None] - key_positions
        picked = by_distance.gather(-1, back.clamp(0, 3).expand(*by_distance.shape[:2], -1, -1))
        return picked.masked_fill((back < 0) | (back >= 4), 0.0) + self.absolute * key_positions


def test_a_bias_is_asked_for_by_distance():
    bias, states, places = Bias(), torch.randn(1, 6, 2, 3), torch.arange(6)
    with Context(places, torch.zeros_like(places), None), relative_biases(bias), torch.no_grad():
        found = bias(states, places, places)
    assert torch.equal(found, (states @ bias.proj).transpose(1, 2))


def test_a_bias_that_depends_on_more_is_refused():
    bias, places = Bias(absolute=0.1), torch.arange(6)
    with (
        Context(places, torch.zeros_like(places), None),
        relative_biases(bias),
        pytest.raises(UnsupportedModel, match="Bias: its position bias depends on more than the distance"),
    ):
        bias(torch.randn(1, 6, 2, 3), places, places)
