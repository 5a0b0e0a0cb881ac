"""torch.compile(model, backend="moec") equals eager, compiles once for all numbers of tokens, says what it leaves."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from moec.compiler.dynamo import backend

pytestmark = pytest.mark.cpu
# float32: sums in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
QUICK = {"verify": "off"}  # evidence has tests of its own


class Moe(nn.Module):
    """Two of four experts for each token, weights gathered. Written by hand."""

    def __init__(self, hidden: int = 16, experts: int = 4, inner: int = 32) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 2 * inner, hidden) / 4)
        self.down = nn.Parameter(torch.randn(experts, hidden, inner) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1, x.shape[-1])
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        gate, up = torch.matmul(self.up[chosen], flat[:, None, :, None]).squeeze(-1).chunk(2, -1)
        every = torch.matmul(self.down[chosen], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (every * weights[..., None]).sum(1).view(x.shape)


def reasons() -> list[str]:
    return [r.reason for r in backend.records]


def test_the_entry_point_finds_the_backend():
    assert "moec" in torch.compiler.list_backends()


def test_one_graph_for_every_number_of_tokens():
    module = Moe().eval()
    fast = torch.compile(module, backend="moec", options=QUICK)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for tokens in (5, 7, 1, 64, 1):
            x = torch.randn(1, tokens, 16)
            torch.testing.assert_close(fast(x), module(x), **CLOSE)
    assert [(r.experts, r.dynamic, r.reason) for r in backend.records] == [(1, ("T",), "")]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_the_first_call_may_have_one_token():
    module = Moe().eval()
    fast = torch.compile(module, backend="moec", options=QUICK)
    with torch.no_grad():
        for tokens in (1, 6):
            x = torch.randn(1, tokens, 16)
            torch.testing.assert_close(fast(x), module(x), **CLOSE)
    assert [(r.dynamic, r.reason) for r in backend.records] == [(("T",), "")]


class PickedRows(Moe):
    """The same experts in a loop that picks the rows of each: sizes follow from values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1, x.shape[-1])
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        y = torch.zeros_like(flat)
        for e, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            rows, place = torch.where(chosen == e)
            gate, value = F.linear(flat[rows], up).chunk(2, -1)
            y.index_add_(0, rows, F.linear(F.silu(gate) * value, down) * weights[rows, place, None])
        return y.view(x.shape)


def test_a_loop_that_picks_rows_is_one_graph_where_it_must_be():
    module = PickedRows().eval()
    fast = torch.compile(module, backend="moec", fullgraph=True, options=QUICK)
    with torch.no_grad():
        for tokens in (5, 7, 1, 64):
            x = torch.randn(1, tokens, 16)
            torch.testing.assert_close(fast(x), module(x), **CLOSE)
    assert [(r.experts, r.dynamic, r.reason) for r in backend.records] == [(1, ("T",), "")]


def test_fixed_sizes_stay_fixed_where_the_user_says_so():
    module = Moe().eval()
    fast = torch.compile(module, backend="moec", dynamic=False, options=QUICK)
    with torch.no_grad():
        x = torch.randn(1, 1, 16)
        torch.testing.assert_close(fast(x), module(x), **CLOSE)
    assert [(r.experts, r.dynamic, r.reason) for r in backend.records] == [(1, (), "")]


def test_training_runs_in_eager_mode_and_says_so_once(caplog):
    module = Moe()
    fast = torch.compile(module, backend="moec", options=QUICK)
    x = torch.randn(1, 5, 16)
    with caplog.at_level(logging.WARNING, logger="moec.compiler.dynamo.backend"):
        fast(x).sum().backward()
        torch._dynamo.reset_code_caches()
        fast(x)
    assert module.up.grad is not None
    assert reasons()[0].startswith("training: 3 of its inputs require gradients")
    assert len([r for r in caplog.records if "training" in r.message]) == 1


def test_a_graph_break_leaves_the_rest_compiled():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = Moe()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.moe(x)
            torch._dynamo.graph_break()
            return y * 2 + 1

    module = Broken().eval()
    fast = torch.compile(module, backend="moec", options=QUICK)
    with torch.no_grad():
        x = torch.randn(1, 5, 16)
        torch.testing.assert_close(fast(x), module(x), **CLOSE)
    assert [r.experts for r in backend.records] == [1, 0] and reasons() == ["", ""]


def test_numbers_that_follow_from_sizes_are_results():
    """What is read behind a graph break leaves the graph before it as numbers, which no program makes."""
    linear = nn.Linear(8, 8)

    @torch.compile(backend="moec", dynamic=True)
    def function(x: torch.Tensor) -> tuple[torch.Tensor, int, bool]:
        y = linear(x)
        count, many = y.shape[0] * 2 + 1, y.shape[0] > 4
        torch._dynamo.graph_break()
        return y * count, count, many

    with torch.no_grad():
        for tokens in (5, 9, 3):
            x = torch.randn(tokens, 8)
            y, count, many = function(x)
            assert (count, many) == (2 * tokens + 1, tokens > 4)
            torch.testing.assert_close(y, linear(x) * count, **CLOSE)
    assert reasons() == [""] * len(backend.records)


def test_changed_weights_are_packed_again_and_then_left_to_eager_mode(caplog, monkeypatch):
    monkeypatch.setattr("moec.compiler.dynamo.compiled.MOST_CHANGES", 1)
    module = Moe().eval()
    fast = torch.compile(module, backend="moec", options=QUICK)
    x = torch.randn(1, 5, 16)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="moec.compiler.dynamo.backend"):
        fast(x)
        for _ in range(3):
            module.up.mul_(1.1)
            torch.testing.assert_close(fast(x), module(x), **CLOSE)
        module.down = nn.Parameter(torch.randn_like(module.down))
        torch.testing.assert_close(fast(x), module(x), **CLOSE)
    assert len(backend.records) == 1
    assert sum("weights changed 2 times" in r.message for r in caplog.records) == 1


def test_two_modules_of_a_class_keep_their_own_weights():
    first, second = Moe().eval(), Moe().eval()
    fast = [torch.compile(m, backend="moec", options=QUICK) for m in (first, second)]
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast[0](x), first(x), **CLOSE)
            torch.testing.assert_close(fast[1](x), second(x), **CLOSE)


def test_results_are_ordinary_tensors():
    module = Moe().eval()
    fast = torch.compile(module, backend="moec", options=QUICK)
    with torch.no_grad():
        y = fast(torch.randn(1, 5, 16))
    assert not y.is_inference() and not y.requires_grad
    y.add_(1)


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda x: x.add_(1) * 2, "an input or a parameter"),
        (lambda x: F.dropout(x, 0.5, True) * 2, "draw random numbers"),
    ],
)
def test_what_cannot_be_compiled_runs_in_eager_mode(function, reason):
    fast = torch.compile(function, backend="moec")
    x = torch.ones(4, 8)
    torch.manual_seed(1)
    found = fast(x.clone())
    torch.manual_seed(1)
    assert torch.equal(found, function(x.clone()))
    assert reason in reasons()[-1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"speed": 9}, "the backend moec has no option 'speed'; known options: dump, target"),
        ({"target": "cuda:sm_90a"}, "this backend runs in the process"),
        ({"weights": "bf16"}, "cast the module instead"),
    ],
)
def test_options_without_a_meaning_are_errors(options, message):
    with pytest.raises(BackendCompilerFailed, match=f"CompileError: torch.compile: .*{message}"):
        torch.compile(Moe(), backend="moec", options=options)(torch.randn(1, 5, 16))
