import pytest
import torch
from torch import nn

from moec.compiler.capture import capture
from moec.passes.ir.evaluate import evaluate

pytestmark = pytest.mark.null


class Shapes(nn.Module):
    def forward(self, x, y):
        t, s = x.shape[0], y.shape[0]
        both = torch.cat([x, y])  # [T + S, 4]
        pairs = (x[:, None] * y[None]).reshape(-1, 4)  # [T * S, 4]
        halves = torch.cat([both, both]).view(2, -1, 4)  # [2, T + S, 4]
        return both.expand(3, -1, -1), pairs, halves, torch.zeros(t * s + 2), torch.arange((t + 1) // 2)


@pytest.fixture(scope="module")
def captured():
    return capture(Shapes(), (torch.randn(5, 4), torch.randn(6, 4)))


@pytest.mark.parametrize(("t", "s"), [(3, 2), (1, 1), (0, 4), (0, 0)])
def test_sums_products_and_quotients(captured, t, s):
    x, y = torch.randn(t, 4), torch.randn(s, 4)
    found = evaluate(captured.graph_module, [x, y], captured.read)
    expected = [(3, t + s, 4), (t * s, 4), (2, t + s, 4), (t * s + 2,), ((t + 1) // 2,)]
    assert [tuple(f.shape) for f in found] == expected


def test_sizes_are_read_from_the_inputs_once(captured):
    graph = captured.graph_module.graph
    reads = graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    assert sorted((n.args[0].name, n.args[1]) for n in reads) == [("x", 0), ("y", 0)]
