"""What joins the body of a recurrence, what stays outside, and what is refused."""

import json

import pytest
import torch
from graphs import Builder, tensors

from moec.compiler.capture.recurrences import cut_recurrences
from moec.compiler.capture.states import state_read, state_write
from moec.compiler.errors import UnsupportedModel
from moec.passes.ir.evaluate import evaluate

pytestmark = pytest.mark.null
aten = torch.ops.aten
READ, WRITE = state_read._opoverload, state_write._opoverload
RECURRENCE = torch.ops.moec.recurrence.default
# the same operations on the same numbers; only matrix products may be cut up otherwise
TOLERANCE = 1e-6


class Update(Builder):
    """state [N,4,6]: state * decay + outer(v, k), read by q and a projection; v [T,4], k, q [T,6], decay [T,4,1]."""

    def __init__(self):
        super().__init__()
        self.v, self.k, self.q = (self.input(n, width) for n, width in (("v", 4), ("k", 6), ("q", 6)))
        self.decay = self.input("decay", 4, 1)
        self.slots = self.input("slots", dtype=torch.long)
        self.cache = self.gm.graph.placeholder("cache_0_a")
        with self.mode:
            self.cache.meta["val"] = torch.empty(5, 4, 6)
        self.state = self(READ, self.cache, self.slots)

    def updated(self):
        outer = self(aten.mul.Tensor, self(aten.unsqueeze.default, self.v, -1), self(aten.unsqueeze.default, self.k, 1))
        return self(aten.add.Tensor, self(aten.mul.Tensor, self.state, self.decay), outer)

    def write(self, new):
        node = self.gm.graph.call_function(WRITE, (self.cache, self.slots, new))
        node.meta["val"] = None

    def answer(self, new):
        seen = self(aten.mul.Tensor, new, self(aten.unsqueeze.default, self.q, 1))
        return self(aten.linear.default, self(aten.sum.dim_IntList, seen, [-1]), self.weight("w", 3, 4))


def whole():
    b = Update()
    new = b.updated()
    b.write(new)
    return b.done(b.answer(new))


def inputs(slots, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4,), (6,), (6,), (4, 1)]
    rows = [torch.randn(len(slots), *shape, generator=generator) for shape in shapes]
    return [*rows, torch.tensor(slots), torch.randn(5, 4, 6, generator=generator)]


READING = tensors(w=torch.randn(3, 4, generator=torch.Generator().manual_seed(9)))


def only(gm):
    (node,) = gm.graph.find_nodes(op="call_function", target=RECURRENCE)
    return node, json.loads(node.args[4])


def test_sequences_of_one_token_give_the_same():
    gm, given = whole(), inputs([3, 0, 4])
    mine = [x.clone() for x in given]
    before = evaluate(gm, given, READING)
    cut_recurrences(gm)
    torch.testing.assert_close(evaluate(gm, mine, READING), before, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(mine[-1], given[-1], atol=TOLERANCE, rtol=TOLERANCE)


def test_tokens_of_one_sequence_follow_each_other():
    gm, given = whole(), inputs([3, 3, 1, 3])
    v, k, q, decay, slots, state = (x.clone() for x in given)
    cut_recurrences(gm)
    found = evaluate(gm, given, READING)
    for t, slot in enumerate(slots.tolist()):
        state[slot] = state[slot] * decay[t] + torch.outer(v[t], k[t])
        row = torch.nn.functional.linear(state[slot] @ q[t], READING("w"))
        torch.testing.assert_close(found[t], row, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(given[-1], state, atol=TOLERANCE, rtol=TOLERANCE)


def test_what_leaves_the_body_is_small_and_products_with_weights_stay_outside():
    gm = whole()
    cut_recurrences(gm)
    _, body = only(gm)
    assert body["types"] == [["float32", [4]]]
    assert [s[0].split(".")[1] for s in body["steps"]] == ["mul", "add", "mul", "sum"]
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"][-1] is aten.linear.default


def test_a_large_outer_product_is_made_inside(monkeypatch):
    monkeypatch.setattr("moec.compiler.capture.recurrences.BLOWN_UP", 2)
    gm = whole()
    cut_recurrences(gm)
    _, body = only(gm)
    assert [s[0] for s in body["steps"]].count("aten.mul.Tensor") == 3


def test_a_value_used_before_the_state_is_complete_comes_after_the_op():
    """What reads the old state may stand in front of what the new one needs."""
    b = Update()
    early = b(aten.sum.dim_IntList, b.state, [-1])
    late = b(aten.mul.Tensor, b.decay, 2.0)
    new = b(aten.mul.Tensor, b.state, late)
    b.write(new)
    gm = b.done(early, b.answer(new))
    given = inputs([2, 4])
    mine = [x.clone() for x in given]
    before = evaluate(gm, given, READING)
    cut_recurrences(gm)
    for a, c in zip(evaluate(gm, mine, READING), before, strict=True):
        torch.testing.assert_close(a, c, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_state_of_the_last_token():
    """New and old do not depend on each other: the op only hands the old one out."""
    b = Update()
    b.write(b.decay)
    gm = b.done(b(aten.neg.default, b.state))
    gm.graph.find_nodes(op="placeholder")[-1].meta["val"] = b.cache.meta["val"]
    cut_recurrences(gm)
    node, body = only(gm)
    assert [a.name for a in node.args[0]] == ["decay"]
    assert body["new_states"] == [0]


def test_a_state_that_nobody_reads_goes():
    b = Update()
    b.write(b.decay)
    gm = b.done(b(aten.neg.default, b.v))
    cut_recurrences(gm)
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [aten.neg.default]


def test_a_state_that_is_never_written_is_refused():
    b = Update()
    gm = b.done(b(aten.neg.default, b.state))
    with pytest.raises(UnsupportedModel, match="reads a state that it never writes"):
        cut_recurrences(gm)


def test_a_state_that_goes_through_an_op_of_ours_is_refused():
    b = Update()
    b.write(b(torch.ops.moec.rms_norm.default, b.state, None, 1e-5))
    gm = b.done(b.answer(b.state))
    with pytest.raises(UnsupportedModel, match=r"its state goes through .*rms_norm"):
        cut_recurrences(gm)
