"""In-place programs against themselves: the graph must give the same values, and hold no in-place op."""

import pytest
import torch
from torch import nn

from moec.compiler.capture import capture
from moec.compiler.capture.functional import writes_in_place
from moec.compiler.errors import UnsupportedModel

pytestmark = pytest.mark.null


def module(function):
    class Module(nn.Module):
        def forward(self, x):
            return function(x)

    return Module()


def later_use_of_the_base(x):
    y = x * 2
    view = y[:, 1:3]
    view += 1
    return y


def later_use_of_another_view(x):
    y = x * 2
    other = y.view(-1, 2, 3)
    y[:, 0].mul_(3)
    return other + 1


def twice(x):
    y = x * 2
    y.add_(1)
    y[:, 2:4].fill_(0.5)
    return y.div_(3), y


def through_a_transpose(x):
    y = x + 0
    y.t()[1].copy_(x[:, 0])
    y.permute(1, 0)[2].add_(1)
    return y


def through_unsqueeze(x):
    y = x + 1
    y.unsqueeze(0)[..., 1].zero_()
    return y


def fresh_and_copied(x):
    y = x.new_empty(x.shape[0], 8)
    y[:, :6] = x
    y[:, 6:] = x[:, :2].double()
    return y


def scattered(x):
    index = x.argmax(-1, keepdim=True)
    mask = torch.zeros_like(x).scatter_(1, index, 1.0)
    return x.clone().masked_fill_(mask.bool(), -1.0)


def accumulated(x):
    y = torch.zeros_like(x)
    y.index_add_(1, torch.tensor([0, 0, 3, 3, 4, 5]), x)
    return y


@pytest.mark.parametrize(
    "function",
    [
        later_use_of_the_base,
        later_use_of_another_view,
        twice,
        through_a_transpose,
        through_unsqueeze,
        fresh_and_copied,
        scattered,
        accumulated,
    ],
)
def test_same_values_without_writes(function):
    captured = capture(module(function), (torch.randn(4, 6),))  # capture itself compares at sizes 1, 2 and 7
    assert not any(writes_in_place(n) for n in captured.graph_module.graph.nodes)


def test_a_dead_write_leaves_nothing():
    def function(x):
        unused = x.new_empty(x.shape[0], 8)
        unused[:, :6] = x
        return x + 1

    graph = capture(module(function), (torch.randn(4, 6),)).graph_module.graph
    assert [str(n.target) for n in graph.nodes if n.op == "call_function"] == ["aten.add.Tensor"]


def test_a_write_into_an_input_is_refused():
    with pytest.raises(UnsupportedModel, match="an input or a parameter"):
        capture(module(lambda x: x.add_(1)), (torch.randn(4, 6),))


def test_a_write_into_a_buffer_is_refused():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count += 1
            return x + self.count

    with pytest.raises(UnsupportedModel, match="count"):
        capture(Counter(), (torch.randn(4, 6),))
