"""Bodies of recurrences: what can stand in one, and that it computes what the nodes did."""

import json
import operator

import pytest
import torch
from graphs import Builder

from moec.passes.infra.rewrite import symbolic
from moec.passes.ir.body import encode_body, run_body

pytestmark = pytest.mark.null
aten = torch.ops.aten


def encoded(build, outputs=slice(-1, None)):
    """The body of what `build(b, x, state)` adds to a graph of x and state [T, 4, 2]."""
    b = Builder()
    x, state = b.input("x", 4, 2), b.input("state", 4, 2)
    build(b, x, state)
    nodes = [n for n in b.gm.graph.nodes if n.op == "call_function" and not isinstance(n.meta["val"], torch.SymInt)]
    return encode_body([x], [], [state], nodes, nodes[outputs], [x], symbolic(x.meta["val"].shape[0]))


def test_constants_and_sizes():
    def build(b, x, state):
        rows = b(torch.ops.aten.sym_size.int, x, 0)
        many = b(torch.ops.aten.mul.Tensor, x, float("-inf"))
        wide = b(aten.to.dtype, many, torch.float64)
        like = b(aten.zeros_like.default, wide, device=torch.device("cpu"), memory_format=torch.preserve_format)
        b(aten.expand.default, b(aten.unsqueeze.default, like, 0), [1, rows, 4, 2])

    body = json.loads(encoded(build, slice(0, 1)))
    texts = json.dumps(body["steps"])
    for part in ('{"number": "-inf"}', '{"dtype": "float64"}', '{"device": "cpu"}', '{"rows": 1}', "preserve_format"):
        assert part in texts
    outputs, states = run_body(body, 3, [torch.ones(3, 4, 2)], [], [torch.zeros(3, 4, 2)])
    assert torch.isinf(outputs[0]).all() and torch.equal(states[0], torch.ones(3, 4, 2))


def test_results_of_several():
    def build(b, x, state):
        parts = b(aten.split.Tensor, b(aten.add.Tensor, x, state), 1, -1)
        b(operator.getitem, parts, 1)

    body = json.loads(encoded(build))
    x, state = torch.randn(2, 4, 2), torch.randn(2, 4, 2)
    (found,), _ = run_body(body, 2, [x], [], [state])
    assert torch.equal(found, (x + state)[..., 1:])


def test_an_op_of_ours_cannot_stand_in_a_body():
    with pytest.raises(ValueError, match=r"rms_norm.default is no ATen operator"):
        encoded(lambda b, x, state: b(torch.ops.moec.rms_norm.default, x, None, 1e-5))


def test_a_size_that_is_no_multiple_cannot():
    def build(b, x, state):
        more = b(operator.add, b(torch.ops.aten.sym_size.int, x, 0), 1)
        b(aten.new_zeros.default, x, [more, 2])

    with pytest.raises(ValueError, match="no multiple of the number of rows"):
        encoded(build)
